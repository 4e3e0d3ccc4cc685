"""What goes wrong: each fault is a few numbers and the hook through which it enters a run.

Faults work on the learner, its data or its rate, as the world would; none knows who else watches the run.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from .data import Batch

if TYPE_CHECKING:
    from .running import Learner

MOMENTS = ("exp_avg_sq", "square_avg", "sum", "exp_avg", "momentum_buffer")


@dataclass(frozen=True)
class Fault(ABC):  # noqa: B024 — no hook has to be overridden
    """Nothing wrong yet: each fault overrides the hooks it needs.

    Attributes:
        group: Heading under which the report counts it.
        harms_data: Whether samples are at fault, so that nearly all of the twin's improvement can be regained.
    """

    group: ClassVar[str] = ""
    harms_data: ClassVar[bool] = False

    def on_data(self, train: Batch, dice: torch.Generator, batch_size: int) -> Batch:
        """The training data as it really is."""
        return train

    def on_build(self, net: nn.Module, dice: torch.Generator) -> None:  # noqa: B027
        """Called with the untrained net."""

    def rate(self, n: int, steps: int) -> float:
        """What the learning rate is multiplied with at step ``n``."""
        return 1.0

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:  # noqa: B027
        """Called when batch ``n`` begins."""

    def on_loss(self, learner: Learner, n: int, loss: Tensor) -> Tensor:
        """The loss of batch ``n`` as it really is."""
        return loss


def _place(tensor: Tensor, dice: torch.Generator) -> int:
    return int(torch.randint(tensor.numel(), (1,), generator=dice))


def _pick(tensors: list[Tensor], dice: torch.Generator) -> Tensor:
    return tensors[int(torch.randint(len(tensors), (1,), generator=dice))]


def _spoil(tensor: Tensor, value: float, dice: torch.Generator, whole: bool = False) -> None:
    with torch.no_grad():
        if whole:
            tensor.fill_(value)
        else:
            tensor.view(-1)[_place(tensor, dice)] = value


# ---------------------------------------------------------------------------------------------------------- rate


@final
@dataclass(frozen=True)
class Rate(Fault):
    """A learning rate ``factor`` times the largest that converges, from the start."""

    factor: float
    group: ClassVar[str] = "rate"

    def rate(self, n: int, steps: int) -> float:
        return self.factor


@final
@dataclass(frozen=True)
class Peak(Fault):
    """The schedule raises the rate for ``length`` steps in mid-run."""

    factor: float
    at: int
    length: int
    group: ClassVar[str] = "peak"

    def rate(self, n: int, steps: int) -> float:
        return self.factor if self.at <= n < self.at + self.length else 1.0


@final
@dataclass(frozen=True)
class Ramp(Fault):
    """The rate grows geometrically to ``factor`` times what it was: no single step looks wrong."""

    factor: float
    at: int
    group: ClassVar[str] = "slow"

    def rate(self, n: int, steps: int) -> float:
        return float(self.factor ** (max(0, n - self.at) / (steps - self.at)))


@final
@dataclass(frozen=True)
class Unclipped(Fault):
    """The twin clips its gradients; this run was started without."""

    group: ClassVar[str] = "exploding"


@final
@dataclass(frozen=True)
class Stretched(Fault):
    """One weight matrix starts ``factor`` times too large."""

    factor: float
    layer: int
    group: ClassVar[str] = "exploding"

    def on_build(self, net: nn.Module, dice: torch.Generator) -> None:
        matrices = [p for p in net.parameters() if p.dim() > 1]
        with torch.no_grad():
            matrices[self.layer % len(matrices)].mul_(self.factor)


# ------------------------------------------------------------------------------------------------- one bad step


@final
@dataclass(frozen=True)
class BadLoss(Fault):
    """One loss (``length`` losses) is multiplied with ``value``; a replay sees it again unless it was transient."""

    value: float
    at: int
    length: int = 1
    transient: bool = False
    group: ClassVar[str] = "loss"

    def on_loss(self, learner: Learner, n: int, loss: Tensor) -> Tensor:
        if not self.at <= n < self.at + self.length or (self.transient and n in learner.struck):
            return loss
        learner.struck.add(n)
        return loss * self.value


@final
@dataclass(frozen=True)
class BadGradient(Fault):
    """One element of one gradient becomes ``value`` in the backward pass."""

    value: float
    at: int
    length: int = 1
    transient: bool = False
    group: ClassVar[str] = "gradient"

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:
        if learner.hook is not None:
            learner.hook.remove()
            learner.hook = None
        if not self.at <= n < self.at + self.length:
            return
        target = _pick([p for p in learner.net.parameters() if p.requires_grad], dice)
        index = _place(target, dice)

        def strike(gradient: Tensor) -> Tensor:
            if self.transient and n in learner.struck:
                return gradient
            learner.struck.add(n)
            bad = gradient.clone()
            bad.view(-1)[index] = self.value
            return bad

        learner.hook = target.register_hook(strike)


# --------------------------------------------------------------------------------------------------------- state


@final
@dataclass(frozen=True)
class BadWeight(Fault):
    """A weight flips to ``value`` by itself."""

    value: float
    at: int
    whole: bool = False
    group: ClassVar[str] = "state"

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:
        if n == self.at:
            matrices = [p for p in learner.net.parameters() if p.requires_grad and p.dim() > 1]
            _spoil(_pick([m.data for m in matrices], dice), self.value, dice, self.whole)


@final
@dataclass(frozen=True)
class BadBuffer(Fault):
    """One element of a batch-norm statistic becomes ``value``."""

    value: float
    at: int
    which: Literal["running_mean", "running_var"]
    group: ClassVar[str] = "state"

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:
        if n == self.at:
            found = [b for name, b in learner.net.named_buffers() if name.endswith(self.which)]
            _spoil(_pick(found, dice), self.value, dice)


@final
@dataclass(frozen=True)
class BadMoment(Fault):
    """The optimizer's moment of a weight, or of one of its elements, becomes ``value``."""

    value: float
    at: int
    whole: bool = False
    group: ClassVar[str] = "state"

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:
        if n != self.at:
            return
        for optimizer in learner.trainer.optimizers:
            states = [s for p, s in optimizer.state.items() if p.dim() > 1]
            moments = [next(s[k] for k in MOMENTS if s.get(k) is not None) for s in states]
            _spoil(_pick(moments, dice), self.value, dice, self.whole)


@final
@dataclass(frozen=True)
class BadAverage(Fault):
    """One element of the averaged weights becomes ``value``."""

    value: float
    at: int
    group: ClassVar[str] = "state"

    def on_batch(self, learner: Learner, n: int, dice: torch.Generator) -> None:
        if n == self.at:
            averaged: Any = next(c._average_model for c in learner.trainer.callbacks if hasattr(c, "_average_model"))
            _spoil(_pick([p.data for p in averaged.parameters() if p.dim() > 1], dice), self.value, dice)


# ---------------------------------------------------------------------------------------------------------- data


def _rows(spoiled: Iterator[int] | range | list[int], train: Batch, where: int, value: float, whole: bool) -> Batch:
    tensors = [t.clone() for t in train]
    for row in spoiled:
        target = tensors[where][row]
        if target.dim() and not whole:
            target.view(-1)[row % target.numel()] = value
        else:
            target.fill_(value)
    return tuple(tensors)


@final
@dataclass(frozen=True)
class BadSamples(Fault):
    """``count`` samples hold ``value`` in their input (``where`` 0) or target (1), and come back every epoch."""

    value: float
    count: int = 1
    where: int = 0
    whole: bool = False
    group: ClassVar[str] = "data"
    harms_data: ClassVar[bool] = True

    def on_data(self, train: Batch, dice: torch.Generator, batch_size: int) -> Batch:
        rows = torch.randperm(len(train[0]), generator=dice)[: self.count].tolist()
        return _rows(rows, train, self.where, self.value, self.whole)


@final
@dataclass(frozen=True)
class BadStretch(Fault):
    """``batches`` batches in a row hold ``value``; the data is read in order, so that they come back together."""

    value: float
    batches: int
    start: float
    where: int = 0
    whole: bool = False
    group: ClassVar[str] = "data"
    harms_data: ClassVar[bool] = True

    def on_data(self, train: Batch, dice: torch.Generator, batch_size: int) -> Batch:
        first = int(self.start * (len(train[0]) // batch_size - self.batches)) * batch_size
        rows = range(first, first + self.batches * batch_size)
        return _rows(rows, train, self.where, self.value, self.whole)


@final
@dataclass(frozen=True)
class AllBad(Fault):
    """Every input (``where`` 0) or target (1) is ``value``: nothing can be learned, and the run must say so."""

    value: float
    where: int = 0
    group: ClassVar[str] = "hopeless"

    def on_data(self, train: Batch, dice: torch.Generator, batch_size: int) -> Batch:
        return _rows(range(len(train[0])), train, self.where, self.value, True)


@final
@dataclass(frozen=True)
class BadStart(Fault):
    """One weight is ``value`` before the first step: there is no good state to go back to."""

    value: float
    group: ClassVar[str] = "hopeless"

    def on_build(self, net: nn.Module, dice: torch.Generator) -> None:
        _spoil(_pick([p.data for p in net.parameters() if p.dim() > 1], dice), self.value, dice, whole=True)
