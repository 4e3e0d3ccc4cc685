"""Invalid learning rates (NaN, infinite, negative), and the last valid ones, which replace them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer


@final
@dataclass(frozen=True, slots=True)
class InvalidRate:
    """A learning rate that is NaN, infinite or negative.

    Attributes:
        group: Number of the parameter group.
        rate: The rate.
        valid: The last valid rate of the group; ``None`` if it never had one.
    """

    group: int
    rate: float
    valid: float | None


@final
class ValidRates:
    """Stores the last valid learning rate of each parameter group.

    A rate on another device than the CPU is not checked, because reading it would wait for the device.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> rates = ValidRates()
        >>> rates.look(optimizer)
        >>> optimizer.param_groups[0]["lr"] = math.nan
        >>> rates.look(optimizer)
        >>> rates.instead_of(optimizer.param_groups[0], math.nan)
        0.5
    """

    def __init__(self) -> None:
        self._valid: dict[int, float] = {}
        self._invalid: dict[int, list[InvalidRate]] = {}

    def look(self, optimizer: Optimizer) -> None:
        """Check the rates of an optimizer that is about to step."""
        invalid: list[InvalidRate] = []
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if isinstance(rate, Tensor):
                if rate.device.type != "cpu" or rate.numel() != 1:
                    continue
                rate = float(rate)
            elif not isinstance(rate, (int, float)):
                continue
            if 0.0 <= rate < math.inf:
                self._valid[id(group)] = rate
            else:
                invalid.append(InvalidRate(number, float(rate), self._valid.get(id(group))))
        if invalid or self._invalid:
            self._note(optimizer, invalid)

    def _note(self, optimizer: Optimizer, invalid: list[InvalidRate]) -> None:
        if invalid:
            self._invalid[id(optimizer)] = invalid
        else:
            self._invalid.pop(id(optimizer), None)

    def any(self) -> bool:
        """Whether any rate was invalid at the last check."""
        return bool(self._invalid)

    def invalid(self, optimizer: Optimizer) -> list[InvalidRate]:
        """The rates of an optimizer that were invalid at the last check."""
        return self._invalid.get(id(optimizer), [])

    def instead_of(self, group: Mapping[str, Any], rate: Any) -> Any:
        """The last valid rate of a group if ``rate`` is invalid and there was a valid one; else ``rate`` itself."""
        if not self._invalid or (isinstance(rate, Tensor) and (rate.device.type != "cpu" or rate.numel() != 1)):
            return rate
        return rate if 0.0 <= float(rate) < math.inf else self._valid.get(id(group), rate)


def words_for(rates: list[InvalidRate], scheduler: str) -> Iterator[str]:
    """Say of each rate what it is, of which group, who set it, and what is used in its place.

    Args:
        rates: The rates.
        scheduler: Name of the scheduler that sets them; empty without one.
    """
    by = f", set by {scheduler}," if scheduler else ""
    for one in rates:
        then = "the update is skipped" if one.valid is None else f"the last valid rate, {one.valid:.4g}, is used"
        yield f"the learning rate of group {one.group}{by} is {one.rate:.4g}; {then}"
