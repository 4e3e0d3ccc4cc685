"""Branches of a run: other states of the learner that are trained on the same batches, without side effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, final

from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import give_scheduled, scheduled_values
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, tensor_bytes
from lightning_nanguard.state.switch import StateSwitch


@final
@dataclass(slots=True)
class Branch:
    """A state of the learner that is trained beside the run.

    Attributes:
        state: The learner.
        rate: State of the learning-rate multiplier.
        clipping: State of the guard's clipping.
    """

    state: Snapshot
    rate: Mapping[str, Any]
    clipping: Mapping[str, Any]


@final
class Branches:
    """Makes branches and trains them on the present batch, then restores learner, rate, clipping and gradients.

    Args:
        context: Objects and settings that the parts of the guard share.
        rehearsal: Stores the present state while branches are trained.
    """

    def __init__(self, context: GuardContext, rehearsal: Rehearsal) -> None:
        self._context = context
        self._rehearsal = rehearsal
        self._switch = StateSwitch(context.learner)
        self.present: Snapshot | None = None
        """The present state of the run, while branches are trained."""

    def hindrance(self, *, run: bool = True) -> str:
        """Why states cannot be compared on the present batch, in words; ``""`` if they can.

        Args:
            run: Whether the present batch may be run once to find out. Otherwise only what is known is said.
        """
        context = self._context
        if context.settings.observe:
            return "the guard only observes"
        if len(context.learner.optimizers) > 1:
            return "the run has several optimizers"
        if not context.replay.trainable():
            return "the batches of this run cannot be run again"
        trace = context.replay.step_trace() if run else None
        if trace is not None and trace.own_targets:
            return (
                "the loss takes values that the model itself makes without a gradient (such as samples or detached "
                "outputs), so it does not show which weights are better"
            )
        if trace is not None and trace.writes:
            return "training_step itself writes to the weights"
        return ""

    def room(self) -> int:
        """Number of states that fit into the share of the free memory that branches may take together."""
        context = self._context
        device, leaves = context.learner.device, dict(context.learner.leaves())
        places = device.devices(leaves.values())
        left = [device.driver.memory(place).free for place in places] or [device.host_memory() // context.ranks.world]
        most = int(context.thresholds.trial.memory_share * min(left)) // max(1, tensor_bytes(leaves))
        return int(min(context.ranks.gather(most)))

    @contextmanager
    def beside(self, step: int | None = None) -> Iterator[bool]:
        """Context in which branches are made, trained and measured. At its end the run is restored.

        Args:
            step: The update that they make. Groups then hold the values that a scheduler gave them for this update.

        Yields:
            Whether there is enough memory for it.
        """
        with self._rehearsal.present(self._switch, self.present) as self.present:
            if self.present is None:
                yield False
                return
            with self._context.replay.rehearsing(), self._scheduled_at(step):
                yield True

    @contextmanager
    def _scheduled_at(self, step: int | None) -> Iterator[None]:
        known = next((groups for at, groups in self._context.state.groups if at == step), None)
        groups = self._context.learner.optimizers[0].param_groups
        if known is None or len(known) != len(groups):
            yield
            return
        now = scheduled_values(groups)
        try:
            give_scheduled(groups, known)
            yield
        finally:
            give_scheduled(groups, now)

    def release(self) -> None:
        """Free the memory for the present state, because no branch is trained any longer."""
        self.present = None

    def of(self, base: Snapshot | None = None, factor: float = 1.0) -> Branch | None:
        """Make a branch from a state, with the present rate times a factor; ``None`` if there is no room for a copy.

        Args:
            base: The state; ``None`` for the present one, before another one is trained or measured.
            factor: Factor on the rate.
        """
        rate, context = self._context.rate, self._context
        if base is not None:
            restore(context.learner, base)
            self._switch.changed()
        state: Snapshot | None = None
        with suppress(OutOfMemory):
            state = self._switch.store(context.state.step)
        known = rate.state_dict()
        if factor != 1.0:
            known |= {"multiplier": rate.ratio() * factor, "max_lr": math.inf}
        if not all(context.ranks.gather(state is not None)) or state is None:
            return None
        return Branch(state, known, context.clipper.state_dict())

    def train(self, branch: Branch) -> float | None:
        """Make the present update from a branch.

        Returns:
            Its loss before the update; ``None`` if it could not be made.
        """
        context = self._context
        self._switch.restore(branch.state)
        with self._rate_of(branch):
            loss = context.replay.train_at_hand()
        self._switch.changed()
        if loss is not None:
            branch.state = self._switch.store(context.state.step, branch.state)
        return loss

    def loss(self, state: Snapshot) -> float | None:
        """The loss of the present batch under a state."""
        self._switch.restore_weights(state)
        loss = self._context.replay.loss_at_hand()
        self._switch.changed()
        return loss

    def losses_of(self, earlier: Sequence[Callable[[], float | None]], state: Snapshot) -> list[float] | None:
        """The losses of earlier batches under a state; ``None`` if one of them cannot be run again."""
        self._switch.restore_weights(state)
        losses = [one() for one in earlier]
        self._switch.changed()
        known = [one for one in losses if one is not None]
        return known if len(known) == len(losses) else None

    def take(self, branch: Branch) -> None:
        """Continue the run from a branch.

        Args:
            branch: The branch. It must not be used afterwards.
        """
        context = self._context
        restore(context.learner, branch.state)
        context.rate.load_state_dict(branch.rate)
        context.clipper.load_state_dict(branch.clipping)

    @contextmanager
    def _rate_of(self, branch: Branch) -> Iterator[None]:
        rate, clipper = self._context.rate, self._context.clipper
        mine = rate.state_dict(), clipper.state_dict()
        rate.load_state_dict(branch.rate)
        clipper.load_state_dict(branch.clipping)
        try:
            yield
        finally:
            rate.load_state_dict(mine[0])
            clipper.load_state_dict(mine[1])
