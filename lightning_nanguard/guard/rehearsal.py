"""Trying a learning rate out: a few updates on the newest batches, from some state, that are undone again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from statistics import fmean
from typing import Protocol, final

import torch

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture


class Stage(Protocol):
    """What a rehearsal asks of the loop around."""

    def rehearsal_batches(self) -> int:
        """How many batches are at hand to rehearse on; 0 where that cannot be done."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside, batches run outside the run's count; at its end all they touched but the learner is put back."""

    def train_on(self, index: int) -> float | None:
        """One plain update on a batch; its loss before the update. ``None`` where that fails."""

    def loss_on(self, index: int) -> float | None:
        """Loss of a batch under the weights of now; ``None`` where it cannot be had."""


# A rehearsal is over once the loss has risen by this many times the loss it began at, or the loss unit, in two
# batches behind each other: under clipping one update may go too far and the next ones come back.
_GONE = 2.0


# Times the gain of the present rate that a larger one must bring to be taken.
_CLEARLY_MORE = 2.0


# Share of what was learned that a rate may cost batches while it learns others, and what it is multiplied by beyond it.
_FORGOTTEN = 0.1


_LOWER = 0.25


@final
class Reviews:
    """When a rate that was cut is looked at again: soon after the cut, then ever more rarely."""

    _first = 50

    def __init__(self) -> None:
        self._next: int | None = None
        self._wait = self._first

    def begin(self, healthy_steps: int) -> None:
        """The rate was changed after this many healthy updates."""
        self._wait = self._first
        self._next = healthy_steps + self._wait

    def due(self, healthy_steps: int) -> bool:
        """Whether it is time; says so once, and waits four times as long for the next."""
        if self._next is None or healthy_steps < self._next:
            return False
        self._wait *= 4
        self._next = healthy_steps + self._wait
        return True

    def state_dict(self) -> dict[str, int | None]:
        """Plain containers."""
        return {"next": self._next, "wait": self._wait}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._next, self._wait = state["next"], state["wait"] or self._first


@final
class Rehearsal:
    """Rehearses rates; learner, rates and gradients are afterwards as they were.

    Args:
        learner: What is trained.
        rate: The learning rate's multiplier.
        stage: The loop around.
        loss_unit: Gives the loss unit.
        ranks: All processes; each rehearses on its own batches, and all go on from the mean.
    """

    _updates = 8
    _lower = (1 / 16, 1 / 256)

    def __init__(
        self,
        learner: Learner,
        rate: LearningRate,
        stage: Stage,
        loss_unit: Callable[[], float],
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks: Ranks = SingleProcess() if ranks is None else ranks
        self._learner = learner
        self._rate = rate
        self._stage = stage
        self.loss_unit = loss_unit
        # The loss of each batch under the state last rehearsed from, where it was looked at: batches may differ by far.
        self._base: tuple[int, int] = (0, 0)
        self._began: dict[int, float] = {}

    def loss_after(self, base: Snapshot, factor: float, updates: int, *, unseen: bool = False) -> float | None:
        """Mean loss of the batches at hand after ``updates`` from ``base`` with the rate times ``factor``.

        The updates take the batches in turn. It is infinite where the loss leaves on the way; the learner is left at
        ``base``. ``None`` where it cannot be done.

        Args:
            base: Where to begin.
            factor: What the rate is multiplied by.
            updates: How many.
            unseen: Train on every other batch, and take the loss of the others: what is learned by heart does not
                count.
        """
        batches = range(self._stage.rehearsal_batches())
        if not batches:
            return None
        trained, measured = (batches[::2], batches[1::2]) if unseen and len(batches) > 1 else (batches, batches)
        if self._base != (id(base), base.step):
            self._base, self._began = (id(base), base.step), {}
        rate = self._rate
        multiplier, min_lr, max_lr = rate.multiplier, rate.min_lr, rate.max_lr
        restore(self._learner, base)
        rate.set_multiplier(rate.ratio() * factor)
        try:
            return self._play(trained, measured, self._horizon(updates))
        finally:
            rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=max_lr)
            restore(self._learner, base)
            for optimizer in self._learner.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def _horizon(self, updates: int) -> int:
        group = self._learner.optimizers[0].param_groups[0]
        # Momentum shows what it does to a rate only once it has built up; LBFGS makes several updates in one step.
        inertia = 2.0 if group.get("momentum") else 1.5 if "betas" in group else 1.0
        return math.ceil(updates * inertia / int(group.get("max_iter", 1)))

    def _play(self, trained: Sequence[int], measured: Sequence[int], updates: int) -> float | None:
        with self._stage.rehearsing():
            stays = self._train(trained, updates)
        if not stays:
            return None if stays is None else math.inf
        # Anew, so that a loss with chance in it meets the same chance whatever was trained before.
        with self._stage.rehearsing():
            losses = [self._stage.loss_on(index) for index in measured]
        if updates == 0:
            self._began = {i: loss for i, loss in zip(measured, losses, strict=True) if loss is not None}
        mean = fmean(loss for loss in losses if loss is not None) if None not in losses else None
        return mean if mean is None or math.isfinite(mean) else math.inf

    def _train(self, batches: Sequence[int], updates: int) -> bool | None:
        first: float | None = None
        unit = self.loss_unit()
        gone = False
        for update in range(updates):
            index = batches[update % len(batches)]
            loss = self._stage.train_on(index)
            if loss is None:
                return None
            first = loss if first is None else first
            began = self._began.get(index, first)
            was_gone, gone = gone, loss > began + _GONE * max(abs(began), unit)
            if not math.isfinite(loss) or (gone and was_gone):
                return False
        return True

    def review(self, untrained: float | None, *, at_most: float = 2.0) -> float:
        """The factor at which the present rate would serve the present state better: 2, 1 or a quarter.

        Short trials favour small rates, so a lower one is taken only where learning some batches costs others a part of
        all that was learned, and a larger one where four times the present one brings clearly more all the same.

        Args:
            untrained: The loss that the run began with; ``None`` where no lower rate is asked for.
            at_most: The largest factor that is asked for.
        """
        with self._present() as present:
            if present is None:
                return 1.0

            def loss(factor: float, updates: int = self._updates) -> float | None:
                return self.loss_after(present, factor, updates, unseen=True)

            before, same = loss(1.0, 0), loss(1.0)
            if before is None or same is None:
                return 1.0
            if untrained is not None and 0 < _FORGOTTEN * (untrained - before) < same - before:
                return _LOWER
            larger = loss(4.0) if at_most > 1 else None
            more = larger is not None and larger < before and before - larger > _CLEARLY_MORE * (before - same)
            return at_most if more else 1.0

    def harmful(self, factor: float) -> bool:
        """Whether from the present state the rate times ``factor`` makes the loss clearly worse."""
        with self._present() as present:
            if present is None:
                return False
            before = self.loss_after(present, 1.0, 0)
            after = self.loss_after(present, factor, 2 * self._updates)
        return before is not None and after is not None and after > before + 0.1 * self.loss_unit()

    @contextmanager
    def _present(self) -> Iterator[Snapshot | None]:
        gradients = [(p, p.grad) for p in self._learner.module.parameters()]
        self._began = {}
        present: Snapshot | None = None
        with suppress(torch.cuda.OutOfMemoryError):
            present = capture(self._learner, step=0, global_step=0)
        if not all(self._ranks.gather(present is not None)) or present is None:
            yield None
            return
        try:
            yield present
        finally:
            restore(self._learner, present)
            if self._learner.scaler is not None and present.scaler:
                # To restore an older snapshot has lowered the scale, and to restore this one does not raise it.
                self._learner.scaler.load_state_dict(present.scaler)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def compare(self, target: Snapshot) -> tuple[float, float] | None:
        """Mean loss of the batches at hand under the state of now and under ``target``; ``None`` without them."""
        with self._present() as present:
            if present is None:
                return None
            now, then = (self.loss_after(base, 1.0, 0) for base in (present, target))
        return None if now is None or then is None else (now, then)

    def compare_each(self, one: Snapshot, other: Snapshot) -> list[tuple[float, float]]:
        """Loss of each batch at hand under two states; empty without batches."""
        if not self._stage.rehearsal_batches():
            return []
        with self._present() as present:
            if present is None:
                return []
            found = []
            for base in (one, other):
                self.loss_after(base, 1.0, 0)
                found.append(self._began)
        return [(mine, its) for index, mine in found[0].items() if (its := found[1].get(index)) is not None]

    def lower_rate_is_better(self, start: Snapshot, loss_unit: float) -> bool | None:
        """Whether a lower rate learns from ``start``, and the present one from the present state does not.

        Args:
            start: A certified snapshot from before the trouble.
            loss_unit: The loss unit: a fifth of it is a clear difference.
        """
        with self._present() as present:
            if present is None:
                return None
            begin = self.loss_after(present, 1.0, 0)
            end = self.loss_after(present, 1.0, self._updates)
            if begin is None or end is None:
                return None
            if begin - end > 0.2 * loss_unit:
                return False
            for factor in self._lower:
                lower = self.loss_after(start, factor, self._updates)
                if lower is None:
                    return None
                # It ends clearly lower, and where the present state stands the present rate brings next to nothing.
                if lower < end - 0.2 * loss_unit and begin - end < (begin - lower) / 3:
                    return True
        return False
