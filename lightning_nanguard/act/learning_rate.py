"""A multiplier on the learning rate that is exact under any scheduler.

Schedulers read the rate that they wrote last. So if a rate is scaled in place, some schedulers scale it again and
others overwrite it. Here the groups hold the scheduled rate at all times, except while ``optimizer.step`` computes. A
pre-hook of the step scales the rate, and a post-hook restores the scheduled rate. A closure, in which Lightning runs
forward and backward, also sees the scheduled rate. So schedulers, checkpoints and code that sets ``lr`` itself never
read a scaled rate, and a step that a GradScaler skips leaves nothing to undo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, final, overload

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_nanguard.act.patches import hook_step
from lightning_nanguard.act.valid_hyperparameters import ValidHyperparameters
from lightning_nanguard.measure.norms import widest_dtype

__all__ = ["LearningRate"]


_Rate: TypeAlias = float | Tensor
_Group: TypeAlias = dict[str, Any]


@final
class LearningRate:
    """Scales the learning rate of every group of some optimizers under any scheduler.

    Attach it once. Then :meth:`set_multiplier` may be called at any time. With a multiplier of 1.0 and no limit no
    group is written to. The only exception is a step with an invalid rate (NaN, infinite, negative), weight decay,
    momentum, betas or eps (NaN, infinite), which is made with the last valid one.

    Args:
        optimizers: The optimizers whose groups are scaled. Groups without an ``lr`` (or with ``None``) are left out
            everywhere.

    Attributes:
        multiplier: The factor on the scheduled rates; 1.0 does not change them.
        min_lr: Floor of the effective rates; a group whose scheduled rate is lower keeps its scheduled rate.
        max_lr: Largest effective rate of the first group. If its rate would be larger, all groups are scaled down.
        valid: The last valid hyperparameters of each group.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> rate = LearningRate([optimizer])
        >>> rate.attach()
        >>> rate.set_multiplier(0.5)
        >>> rate.effective(), rate.scheduled(), optimizer.param_groups[0]["lr"]
        ([0.25], [0.5], 0.5)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self.multiplier = 1.0
        self.min_lr = 0.0
        self.max_lr = math.inf
        self._scaled: dict[int | tuple[int, str], _Scaled] = {}
        self._unhook: list[Callable[[], None]] = []
        self._before_update: Callable[[Optimizer], None] = _nothing
        self.valid = ValidHyperparameters()

    def has_tensors(self) -> bool:
        """Whether a rate is a tensor. Reading it may wait for a device."""
        return any(isinstance(rate, Tensor) for rate in self._scheduled_rates())

    def ratio(self) -> float:
        """Effective rate over scheduled rate of the first group: the multiplier in effect, limits included."""
        scheduled, effective = next(self._bases(), None), self.effective()[:1]
        # No ratio exists for a rate that is zero or not finite.
        return effective[0] / float(scheduled) if scheduled and math.isfinite(scheduled) else self.multiplier

    def set_multiplier(self, value: float, *, min_lr: float = 0.0, max_lr: float = math.inf) -> None:
        """Changes the multiplier, starting with the next update.

        Args:
            value: Positive and finite.
            min_lr: Floor of every group's effective rate; never raises one above its scheduled rate.
            max_lr: Largest effective rate of the first group; all groups are scaled down in proportion.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if not (0 < value < math.inf and 0 <= min_lr < math.inf and max_lr > 0):
            raise ValueError(
                f"LearningRate.set_multiplier({value!r}, min_lr={min_lr!r}, max_lr={max_lr!r}): out of range."
            )
        applied = [optimizer for optimizer in self._optimizers if self._is_applied(optimizer)]
        self.withdraw()
        self.multiplier, self.min_lr, self.max_lr = float(value), float(min_lr), float(max_lr)
        for optimizer in applied:
            self._apply(optimizer)

    def effective(self) -> list[float]:
        """The rates of the next step, one per group over all optimizers. It reads tensor rates to the host."""
        factor = self._factor()
        return [float(self._scale(rate, factor)) for rate in self._bases()]

    def first(self) -> float | None:
        """Effective rate of the first group, ``None`` if reading it would wait for a device."""
        if self._optimizers and not self.is_on():  # faster, because this is called in every step
            rate = self._optimizers[0].param_groups[0].get("lr")
            if isinstance(rate, float):
                return rate
        rate = next(self._bases(), None)
        if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu"):
            return None
        return float(self._scale(rate, self._factor()))

    def scheduled(self) -> list[float]:
        """The rates that the user's scheduler or configuration sets, in the same order as :meth:`effective`."""
        return [float(rate) for rate in self._scheduled_rates()]

    def attach(
        self,
        before_update: Callable[[Optimizer], None] | None = None,
        after_update: Callable[[], None] | None = None,
    ) -> None:
        """Registers the hooks around every optimizer's ``step``; does nothing if they are already registered.

        Args:
            before_update: Called in each step when its gradients are ready: after the closure, or at the beginning of a
                step without one. The caller has to let ``valid`` check the rates before each call.
            after_update: Called after each step.
        """
        if self._unhook:
            return
        self._before_update = before_update or _nothing
        self._after_update = after_update
        for optimizer in self._optimizers:
            self._unhook += hook_step(optimizer, self._before_step, self._after_step)

    def detach(self) -> None:
        """Restores the scheduled rates and removes the hooks; the multiplier is kept for the next :meth:`attach`."""
        self.withdraw()
        while self._unhook:
            self._unhook.pop()()

    def apply(self) -> None:
        """Writes the scaled rates into the groups for a reader outside a step, such as a LearningRateMonitor.

        Call :meth:`withdraw` right after: a scheduler that computes from a scaled rate is not exact.
        """
        for optimizer in self._optimizers:
            self._apply(optimizer)

    def withdraw(self) -> None:
        """Restores the scheduled rates after :meth:`apply`, or after a step that raised."""
        for optimizer in self._optimizers:
            self._withdraw(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The multiplier and its floor; the rates themselves are in the optimizers' own state, unscaled."""
        return {"multiplier": self.multiplier, "min_lr": self.min_lr, "max_lr": self.max_lr}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        max_lr = state_dict.get("max_lr", math.inf)
        self.set_multiplier(state_dict["multiplier"], min_lr=state_dict["min_lr"], max_lr=max_lr)

    # ---- hooks around the step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The closure is wrapped even at a multiplier of 1.0: the guard may change the multiplier inside it.
        # The rates are checked in the call before the update; LBFGS reads them before its closure.
        if self._before_update is _nothing or isinstance(optimizer, LBFGS):
            self.valid.look(optimizer)
        closure = kwargs.get("closure")
        if closure is not None:
            kwargs = {**kwargs, "closure": partial(self._run_closure, optimizer, closure)}
        elif len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            args = (args[0], partial(self._run_closure, optimizer, args[1]), *args[2:])
        else:
            self._before_update(optimizer)
        # Most optimizers read the rate after the closure, some (LBFGS) before it: scale it in both places.
        self._apply(optimizer)
        return args, kwargs

    def _run_closure(self, optimizer: Optimizer, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._scaled:
            self._withdraw(optimizer)
        result = closure(*args, **kwargs)
        self._before_update(optimizer)
        self._apply(optimizer)
        return result

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._scaled:
            self._withdraw(optimizer)
        if self._after_update is not None:
            self._after_update()

    # ---- groups

    def _apply(self, optimizer: Optimizer) -> None:
        if not self.is_on():
            return
        factor = self._factor_where_it_is()
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if rate is None or self._find(group, rate) is not None:
                continue
            base = self.valid.rate(group, rate)
            if isinstance(rate, Tensor):
                # In place: the tensor is an input of compiled and captured steps.
                with torch.no_grad():
                    scheduled = rate.clone()
                    rate.copy_(torch.as_tensor(self._scale(scheduled if base is rate else base, factor)))
                self._scaled[id(rate)] = _Scaled(optimizer, group, "lr", rate, scheduled, rate._version)
            else:
                written = group["lr"] = self._scale(base, float(factor))
                self._scaled[id(group)] = _Scaled(optimizer, group, "lr", written, rate)
        for group, key, valid in self.valid.others(optimizer):
            if (id(group), key) not in self._scaled:
                self._scaled[id(group), key] = _Scaled(optimizer, group, key, valid, group[key])
                group[key] = valid

    def _withdraw(self, optimizer: Optimizer) -> None:
        for key, scaled in list(self._scaled.items()):
            if scaled.optimizer is optimizer:
                del self._scaled[key]
                scaled.restore()

    def _is_applied(self, optimizer: Optimizer) -> bool:
        return any(scaled.optimizer is optimizer for scaled in self._scaled.values())

    def _find(self, group: _Group, rate: _Rate) -> _Scaled | None:
        """The record of a scaled rate, ``None`` if ``rate`` is a scheduled one."""
        # Groups may share one tensor, which must be scaled only once, so tensors are identified by their own id.
        scaled = self._scaled.get(id(rate) if isinstance(rate, Tensor) else id(group))
        return scaled if scaled is not None and scaled.is_what_we_wrote(rate) else None

    def _scheduled_rates(self) -> Iterator[_Rate]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = group.get("lr")
                if rate is not None:
                    scaled = self._find(group, rate)
                    yield rate if scaled is None else scaled.scheduled

    def _bases(self) -> Iterator[_Rate]:
        """The rates that are scaled: the scheduled ones, or the last valid ones in place of invalid ones."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        for group, rate in zip(
            (one for one in groups if one.get("lr") is not None), self._scheduled_rates(), strict=True
        ):
            yield self.valid.rate(group, rate)

    def is_on(self) -> bool:
        """Whether any rate may be scaled or replaced."""
        return self.multiplier != 1.0 or self.max_lr != math.inf or self.valid.any()

    def _factor(self) -> float:
        """The factor on every scheduled rate. If a limit is set, it reads the first group's rate."""
        if self.max_lr == math.inf:
            return self.multiplier
        first = float(next(self._bases(), 0.0))
        return min(self.multiplier, self.max_lr / first) if first > 0 else self.multiplier

    def _factor_where_it_is(self) -> _Rate:
        """The same factor. It is a tensor if the first group's rate is one, so that the host does not wait for it."""
        first = next(self._bases(), None) if self.max_lr != math.inf else None
        if not isinstance(first, Tensor):
            return self._factor()
        with torch.no_grad():
            wide = first.to(widest_dtype(first.device))
            within = (self.max_lr / wide).clamp(max=self.multiplier)
            return torch.where(first > 0, within, self.multiplier)

    @overload
    def _scale(self, rate: Tensor, factor: _Rate) -> Tensor: ...
    @overload
    def _scale(self, rate: float, factor: float) -> float: ...
    def _scale(self, rate: _Rate, factor: _Rate) -> _Rate:
        if not isinstance(factor, Tensor) and factor == 1.0:
            return rate
        if isinstance(rate, Tensor):
            return torch.maximum((rate * factor).to(rate.dtype), rate.clamp(max=self.min_lr))
        factor = float(factor)
        return max(rate * factor, min(self.min_lr, rate))


@final
@dataclass(frozen=True, slots=True)
class _Scaled:
    """One scaled rate, or another value of a group: the written value, its place, and the value it replaces."""

    optimizer: Optimizer
    group: _Group
    key: str
    written: Any
    scheduled: Any
    version: int = 0

    def is_what_we_wrote(self, rate: Any) -> bool:
        """Whether the rate was not set since. It compares identity, because somebody may set an equal value."""
        if isinstance(rate, Tensor):
            # Unlike a comparison of values, the version counter does not wait for the device.
            return rate is self.written and rate._version == self.version
        return rate is self.written

    def restore(self) -> None:
        """Restores the scheduled rate, unless somebody has set another one since."""
        if isinstance(self.written, Tensor) and isinstance(self.scheduled, Tensor):
            if self.is_what_we_wrote(self.written):
                with torch.no_grad():
                    self.written.copy_(self.scheduled)
        elif self.is_what_we_wrote(self.group.get(self.key)):
            self.group[self.key] = self.scheduled


def _nothing(optimizer: Optimizer) -> None:
    pass
