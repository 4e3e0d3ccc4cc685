"""Carries plans out. An observing guard only says what the plan would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

from torch import Tensor

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.remedy_actions import RemedyActions
from lightning_nanguard.state.plausibility import PlausibilityCheck
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Clip, DropMoments, Plan, PlanStep, Restore, RestoreAverages, Scale, Skip, Stop

_CORRECTIONS = (Clip, DropMoments, Scale)


@final
@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a plan.

    Attributes:
        steps: The steps that were made, or would have been.
        redone: Whether the updates since the restored snapshot were made again.
        redo_failed: Whether they were, and made the same tensor implausible again, so that they were undone.
        restored: The snapshot that was restored; ``None`` if none was.
        unrestored: A tensor that is still not finite after the restore, in words; ``None`` if there is none.
    """

    steps: Sequence[PlanStep]
    redone: bool = False
    redo_failed: bool = False
    restored: Snapshot | None = None
    unrestored: str | None = None


@final
@dataclass(eq=False)
class ActingRunner:
    """Carries plans out.

    Args:
        context: Objects and settings that the parts of the guard share.
        actions: Makes what remedies may do to the run in one intervention, by its fault and ``known_until``.
        remedies: The remedy that carries out each kind of step.
        skipper: Skips updates.
        plausibility: Knows whether a batch made buffers bad.
        caution: Is told about undone updates.
    """

    look: ClassVar[Look] = "replay"
    """How closely a diagnosis may examine a faulty batch."""

    at_once = False
    """Whether a bad batch is recorded before its update is made, rather than at the end of the batch."""

    context: GuardContext
    actions: Callable[[FoundFault, int], RemedyActions]
    remedies: Mapping[type[PlanStep], Remedy]
    skipper: StepSkipper
    plausibility: PlausibilityCheck
    caution: Caution

    def block(self, optimizer_index: int) -> None:
        """Skip the update that an optimizer is about to make."""
        self.skipper.skip(optimizer_index)

    def undo(self, found: FoundFault) -> Mapping[str, Tensor]:
        """Undo what a faulty batch changed; if nothing is undone, return the buffers as they were before it."""
        self.actions(found, 0).skip()
        return {}

    def apply(
        self, plan: Plan, found: FoundFault, known_until: int, *, corrupt: str | None = None, may_redo: bool = True
    ) -> Applied:
        """Carry out a plan.

        Args:
            plan: The plan.
            found: The fault.
            known_until: Last update whose reading is kept even if a state from before it is restored.
            corrupt: A tensor that was not finite, and from which the fault came.
            may_redo: Whether updates may be made again after a rollback.
        """
        state, before = self.context.state, self.context.rate.effective()
        actions = self.actions(found, known_until)
        if any(isinstance(step, Skip) for step in plan):
            state.skipped.append(found.reading.step)
        else:
            actions.skip()  # undo the batch too if a restore follows
        if any(isinstance(step, Stop) for step in plan):
            self._leave_good(actions)
        made: list[PlanStep] = []
        may_redo &= found.fault.scope == "state" or not any(isinstance(step, _CORRECTIONS) for step in plan)
        redone = averages_redone = redo_failed = False
        for step in plan:
            if redone and isinstance(step, _CORRECTIONS):
                continue  # the state became bad by itself, so no correction is needed
            if isinstance(step, RestoreAverages) and found.fault.scope == "state" and self._redo_averages(actions):
                averages_redone = True
                made.append(Restore())
                continue
            self.remedies[type(step)].apply(step, actions)
            made.append(step)
            if isinstance(step, Restore) and may_redo and self._redo(actions):
                redo_failed = self.plausibility.is_far(found.fault.place)
                redone = state.redone = not redo_failed
                if redo_failed and actions.restored is not None:
                    restore(self.context.learner, actions.restored)
        # After a restore no reading is pending.
        if actions.restored is not None:
            if not redone:  # otherwise the fault happened by chance
                self.plausibility.watch(corrupt or found.fault.place)
            self.caution.update_undone(found, buffers=self.plausibility.watches)
        kept = self.context.rate.effective() == before
        # If clipping alone is enough, the planned cut has not been made.
        steps = [step for step in made if not (kept and isinstance(step, Scale) and step.clipped)]
        return Applied(steps, redone or averages_redone, redo_failed, actions.restored, actions.unrestored)

    def _redo(self, actions: RemedyActions) -> bool:
        """Make the updates since the restored snapshot again; return whether this was possible."""
        redo, restored, found = self.context.replay.redo, actions.restored, actions.found
        if restored is None or redo is None or found.arm is not None:
            return False  # an arm has made its own updates
        self.skipper.skipped.clear()  # these updates must be made
        return redo(restored, found.not_again(restored.step))

    def _redo_averages(self, actions: RemedyActions) -> bool:
        """Make the updates since the newest snapshot again, with their averages; return whether the state is then good.

        If it is not, nothing has changed.
        """
        redo, good = self.context.replay.redo, self.context.ring.last_certified
        if redo is None or good is None or not redo(good, None):
            return False
        if self.plausibility.is_far(actions.found.fault.place):
            return False  # the updates that were made again have the same bits
        actions.redone(good)
        return True

    def _leave_good(self, actions: RemedyActions) -> None:
        ring, learner = self.context.ring, self.context.learner
        if ring.certified:
            actions.restore(0)
        elif (pending := ring.newest()) is not None and self.context.corrupt()[0]:
            # No snapshot was ever certified, but the state at the start of the fit is at least finite.
            restore(learner, pending)


@final
class ObservingRunner:
    """Changes nothing. Its methods are called like those of :class:`ActingRunner`."""

    look: ClassVar[Look] = "batch"
    at_once = True

    def block(self, optimizer_index: int) -> None:
        """Let the update be made."""

    def undo(self, found: FoundFault) -> Mapping[str, Tensor]:
        """Undo nothing; return the buffers as they were before the batch."""
        return {} if found.undo is None else found.undo.before()

    def apply(
        self, plan: Plan, found: FoundFault, known_until: int, *, corrupt: str | None = None, may_redo: bool = True
    ) -> Applied:
        """Do nothing; return the steps that would have been made."""
        return Applied(plan)


PlanRunner: TypeAlias = ActingRunner | ObservingRunner
"""Carries out what the guard decides, or only says what it would do."""
