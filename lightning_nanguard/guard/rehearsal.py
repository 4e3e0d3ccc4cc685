"""Tries learning rates: makes a few updates on the newest batches from a given state, then undoes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from statistics import fmean
from typing import final

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.state.switch import StateSwitch
from lightning_nanguard.thresholds.rate_search import ReviewThresholds

_logger = logging.getLogger("lightning_nanguard")


@cache
def _say_no_room() -> None:
    _logger.info("NaNGuard: the device has no room to rehearse learning rates, so the rate is cut without a rehearsal.")


@final
class Reviews:
    """Decides when a rate that was cut is reviewed: soon after the cut, then at growing intervals."""

    def __init__(self, limits: ReviewThresholds) -> None:
        self._limits = limits
        self._next: int | None = None
        self._wait = limits.first_after

    def begin(self, healthy_steps: int) -> None:
        """Note that the rate was changed after this many healthy updates."""
        self._wait = self._limits.first_after
        self._next = healthy_steps + self._wait

    def due(self, healthy_steps: int) -> bool:
        """Whether a review is due. If so, the wait for the next one is four times as long."""
        if self._next is None or healthy_steps < self._next:
            return False
        self._wait *= self._limits.wait_ratio
        self._next = healthy_steps + self._wait
        return True

    def state_dict(self) -> dict[str, int | None]:
        """The state in plain containers."""
        return {"next": self._next, "wait": self._wait}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._next, self._wait = state["next"], state["wait"] or self._limits.first_after


@final
class Rehearsal:
    """Tries learning rates on the newest batches.

    Learner, rates and gradients are restored afterwards, except that :meth:`loss_after` leaves the learner at ``base``.
    With several ranks each trains on its own batches, and all continue from the mean.

    Args:
        context: Objects and settings that the parts of the guard share.
    """

    def __init__(self, context: GuardContext) -> None:
        self._context = context
        self._learner = context.learner
        self._rate = context.rate
        self._replay = context.replay
        self._limits = context.thresholds.rate_search.rehearsal
        self._cut = context.thresholds.rate_search.cut
        self._reviews = context.thresholds.rate_search.review
        # The losses of single batches under the base state, if measured: batches may have different losses.
        self._base: tuple[int, int] = (0, 0)
        self._began: dict[int, float] = {}

    def loss_after(self, base: Snapshot, factor: float, updates: int, *, unseen: bool = False) -> float | None:
        """Mean loss of the recent batches after some updates from a state, with the rate times a factor.

        The updates use the batches in turn. The loss is infinite if it diverged during them, and ``None`` if no batch
        can be run. The learner is left at ``base``, without gradients.

        Args:
            base: The state to begin at.
            factor: Factor on the rate.
            updates: Number of updates, before it is adapted to the optimizer (more with momentum).
            unseen: Whether to train on every other batch and measure the loss on the rest, so that memorised batches do
                not count.
        """
        batches = range(self._replay.rehearsal_batches())
        if not batches:
            return None
        trained, measured = (batches[::2], batches[1::2]) if unseen and len(batches) > 1 else (batches, batches)
        if self._base != (id(base), base.step):
            self._base, self._began = (id(base), base.step), {}
        inertia = self._inertia()
        losses = self._after(base, factor, math.ceil(updates * inertia), trained, measured)
        if updates == 0 and losses is not None:
            self._began = dict(zip(measured, losses, strict=True))
        return None if losses is None else fmean(losses)

    def _after(
        self, base: Snapshot, factor: float, updates: int, trained: Sequence[int], measured: Sequence[int]
    ) -> list[float] | None:
        rate = self._rate
        multiplier, min_lr, max_lr = rate.multiplier, rate.min_lr, rate.max_lr
        restore(self._learner, base)
        rate.set_multiplier(rate.ratio() * factor)
        try:
            return self._play(trained, measured, updates)
        except OutOfMemory:
            _say_no_room()
            return None
        finally:
            rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=max_lr)
            restore(self._learner, base)
            for optimizer in self._learner.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def _inertia(self) -> float:
        group = self._learner.optimizers[0].param_groups[0]
        # Momentum takes some updates to build up, so more updates are made.
        return self._limits.momentum if group.get("momentum") else self._limits.adaptive if "betas" in group else 1.0

    def _play(self, trained: Sequence[int], measured: Sequence[int], updates: int) -> list[float] | None:
        # LBFGS makes several updates in one step.
        steps = math.ceil(updates / int(self._learner.optimizers[0].param_groups[0].get("max_iter", 1)))
        with self._replay.rehearsing():
            stays = self._train(trained, steps)
        if not stays:
            return None if stays is None else [math.inf] * len(measured)
        # Start a new context, so that random numbers in the loss do not depend on the training before.
        with self._replay.rehearsing():
            losses = [self._replay.loss_on(index) for index in measured]
        known = [loss for loss in losses if loss is not None]
        return [loss if math.isfinite(loss) else math.inf for loss in known] if len(known) == len(losses) else None

    def _train(self, batches: Sequence[int], updates: int) -> bool | None:
        first: float | None = None
        unit = self._context.monitors.loss_unit()
        gone = False
        for update in range(updates):
            index = batches[update % len(batches)]
            loss = self._replay.train_on(index)
            if loss is None:
                return None
            first = loss if first is None else first
            began = self._began.get(index, first)
            was_gone, gone = gone, loss > began + self._limits.diverged * max(abs(began), unit)
            if not math.isfinite(loss) or (gone and was_gone):
                return False
        return True

    def review(self, untrained: float | None, *, at_most: float) -> float:
        """The factor by which the rate should change: ``at_most`` (raise), 1 (keep) or 1/4 (lower).

        Short tests favour low rates. So the rate is lowered only if training on some batches clearly raises the loss of
        the others. It is raised only if four times the present rate lowers the loss clearly more.

        Args:
            untrained: Loss of the first healthy update; ``None`` if the rate may not be lowered.
            at_most: The factor that stands for a higher rate; 1 if the rate may not be raised.
        """
        reviews = self._reviews
        with self.present() as present:
            if present is None:
                return 1.0

            def loss(factor: float, updates: int = self._cut.updates) -> float | None:
                return self.loss_after(present, factor, updates, unseen=True)

            before, same = loss(1.0, 0), loss(1.0)
            if before is None or same is None:
                return 1.0
            if untrained is not None and 0 < reviews.forgotten * (untrained - before) < same - before:
                return self._cut.ratio
            larger = loss(1 / self._cut.ratio) if at_most > 1 else None
            more = larger is not None and larger < before and before - larger > reviews.clearly_more * (before - same)
            return at_most if more else 1.0

    def harmful(self, factor: float) -> bool:
        """Whether training from the present state at the rate times ``factor`` clearly raises the loss."""
        with self.present() as present:
            if present is None:
                return False
            before = self.loss_after(present, 1.0, 0)
            after = self.loss_after(present, factor, 2 * self._cut.updates)
        least = self._cut.harm * self._context.monitors.loss_unit()
        return before is not None and after is not None and after > before + least

    @contextmanager
    def present(self, switch: StateSwitch | None = None, reuse: Snapshot | None = None) -> Iterator[Snapshot | None]:
        """Context at whose end the learner is restored. Yields the present state; ``None`` if a copy has no room.

        Args:
            switch: Stores and restores the state; by default one that is made for it.
            reuse: A snapshot whose memory is used again.
        """
        switch = StateSwitch(self._learner) if switch is None else switch
        switch.changed()
        gradients = [(p, p.grad) for p in self._learner.module.parameters()]
        self._began = {}
        present: Snapshot | None = None
        with suppress(OutOfMemory):
            present = switch.store(0, reuse)
        if not all(self._context.ranks.gather(present is not None)) or present is None:
            yield None
            return
        try:
            yield present
        finally:
            switch.changed()
            switch.restore(present)
            if self._learner.scaler is not None and present.scaler:
                # Restoring an older snapshot lowers the loss scale, and restoring this one does not raise it again.
                self._learner.scaler.load_state_dict(present.scaler)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def compare_each(self, one: Snapshot, other: Snapshot) -> list[tuple[float, float]]:
        """The loss of each recent batch under two states; empty if no batch is stored."""
        if not self._replay.rehearsal_batches():
            return []
        with self.present() as present:
            if present is None:
                return []
            found = []
            for base in (one, other):
                self.loss_after(base, 1.0, 0)
                found.append(self._began)
        return [(mine, its) for index, mine in found[0].items() if (its := found[1].get(index)) is not None]
