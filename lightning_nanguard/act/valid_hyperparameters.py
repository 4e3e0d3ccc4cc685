"""Invalid learning rates and other hyperparameters of parameter groups, and the last valid values in their place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

_RATE = "lr"
# A larger rate is infinite in the number format of the weights, and torch's optimizers raise an error.
_LARGEST = torch.finfo(torch.float32).max
# Other values of a group may be Inf on purpose, for example a limit that is off.
_OTHERS = ("weight_decay", "momentum", "dampening", "betas", "eps", "alpha")


@final
@dataclass(frozen=True, slots=True)
class InvalidHyperparameter:
    """A hyperparameter of a parameter group that is NaN or infinite, or a learning rate that is negative or too large.

    Attributes:
        group: Number of the parameter group.
        key: Its key in the group, such as ``"lr"``.
        value: Its value: a number, or several numbers (``betas``).
        valid: Its last valid value; ``None`` if it never had one.
    """

    group: int
    key: str
    value: Any
    valid: Any

    @property
    def number(self) -> float:
        """The number that is invalid."""
        return next(float(one) for one in _numbers(self.value) if not _is_valid_number(self.key, one))

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{'learning rate' if self.key == _RATE else self.key} of group {self.group}"


@final
class ValidHyperparameters:
    """Stores the last valid learning rate, weight decay, momentum, betas and eps of each parameter group.

    A rate on another device than the CPU is not checked, because reading it would wait for the device.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> valid = ValidHyperparameters()
        >>> valid.look(optimizer)
        >>> optimizer.param_groups[0]["lr"] = math.nan
        >>> valid.look(optimizer)
        >>> valid.rate(optimizer.param_groups[0], math.nan)
        0.5
    """

    def __init__(self) -> None:
        self._valid: dict[int, dict[str, Any]] = {}
        self._invalid: dict[int, list[InvalidHyperparameter]] = {}

    def look(self, optimizer: Optimizer) -> None:
        """Check the hyperparameters of an optimizer that is about to step."""
        invalid: list[InvalidHyperparameter] = []
        for number, group in enumerate(optimizer.param_groups):
            valid = self._valid.setdefault(id(group), {})
            for key in (_RATE, *_OTHERS):
                value = group.get(key)
                if value is None or value is valid.get(key):
                    continue
                if isinstance(value, Tensor):
                    if key != _RATE or not _is_read(value):
                        continue
                    value = float(value)
                if all(_is_valid_number(key, one) for one in _numbers(value)):
                    # Copied, because somebody may change the list.
                    valid[key] = value.copy() if isinstance(value, list) else value
                else:
                    invalid.append(InvalidHyperparameter(number, key, value, valid.get(key)))
        if invalid:
            self._invalid[id(optimizer)] = invalid
        elif self._invalid:
            self._invalid.pop(id(optimizer), None)

    def any(self) -> bool:
        """Whether anything was invalid at the last check."""
        return bool(self._invalid)

    def invalid(self, optimizer: Optimizer) -> list[InvalidHyperparameter]:
        """The hyperparameters of an optimizer's groups that were invalid at the last check."""
        return self._invalid.get(id(optimizer), [])

    def used(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The values of each group with which the last update was made, as far as they are checked."""
        return [dict(self._valid.get(id(group), {})) for group in optimizer.param_groups]

    def use(self, optimizer: Optimizer, others: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take the values of another process in place of invalid ones, and check the hyperparameters again.

        Args:
            optimizer: The optimizer.
            others: Lists of values like :meth:`used`. The first one that has a value counts.
        """
        for one in self.invalid(optimizer):
            groups = (groups[one.group] for groups in others if one.group < len(groups))
            value = next((group[one.key] for group in groups if group.get(one.key) is not None), None)
            if value is not None:
                known = tuple(value) if isinstance(one.value, tuple) else value
                self._valid[id(optimizer.param_groups[one.group])][one.key] = known
        self.look(optimizer)

    def present(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The values of each group at the last check, without those that were invalid."""
        made = self.used(optimizer)
        for one in self.invalid(optimizer):
            made[one.group].pop(one.key, None)
        return made

    def rate(self, group: Mapping[str, Any], rate: Any) -> Any:
        """The last valid rate of a group if ``rate`` is invalid and there was a valid one; else ``rate`` itself."""
        if not self._invalid or (isinstance(rate, Tensor) and not _is_read(rate)):
            return rate
        return rate if _is_valid_number(_RATE, float(rate)) else self._valid.get(id(group), {}).get(_RATE, rate)

    def others(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Each invalid value except rates, if it was valid before: its group, key and last valid value."""
        for one in self.invalid(optimizer):
            if one.key != _RATE and one.valid is not None:
                yield optimizer.param_groups[one.group], one.key, one.valid


def _is_read(rate: Tensor) -> bool:
    return rate.device.type == "cpu" and rate.numel() == 1


def _numbers(value: Any) -> Iterator[float]:
    for one in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(one, (int, float)):
            yield one


def _is_valid_number(key: str, number: float) -> bool:
    if key == _RATE:
        return 0.0 <= number <= _LARGEST
    return -math.inf < number < math.inf


def words_for(invalid: list[InvalidHyperparameter], scheduler: str) -> Iterator[str]:
    """Describe each invalid hyperparameter: its value, its group, who set it, and the value used instead.

    Args:
        invalid: The hyperparameters.
        scheduler: Name of the scheduler that sets the rates; empty without one.
    """
    for one in invalid:
        by = f", set by {scheduler}," if scheduler and one.key == _RATE else ""
        kind = "rate" if one.key == _RATE else "value"
        then = "the update is skipped" if one.valid is None else f"the last valid {kind}, {_text(one.valid)}, is used"
        yield f"the {one.name}{by} is {_text(one.value)}; {then}"


def _text(value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return f"{value:.4g}"
    return f"({', '.join(f'{one:.4g}' if isinstance(one, (int, float)) else str(one) for one in value)})"
