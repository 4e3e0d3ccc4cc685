"""Puts the parts of a guard together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.act.skip import StepBlocker
from lightning_nanguard.checkpoints.saving import Saving
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.guard.acting import Acting, Conduct, Observing
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.deferred_readback import DeferredReadback, DeferredReadings
from lightning_nanguard.guard.guard import Guard, GuardParts
from lightning_nanguard.guard.interventions import Interventions
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.rank_readback import RankReadback
from lightning_nanguard.guard.readback import MAX_DELAY, Readback
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.guard.remedy_actions import RemedyActions
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.step_readback import StepReadback
from lightning_nanguard.state.batch_undo import BatchUndo


def build_guard(
    context: GuardContext,
    loop: TrainingLoop,
    *,
    policy: Policy,
    remedies: Sequence[Remedy],
    make_undo: Callable[[], BatchUndo],
) -> Guard:
    """Make a guard.

    Args:
        context: What its parts share.
        loop: The loop around.
        policy: Decides.
        remedies: What may follow when skipping is not enough, in order of preference.
        make_undo: Makes an object that undoes what a batch changed.
    """
    carried_out_by = executors(remedies)
    rehearsal = Rehearsal(context)
    investigator = Investigator(context, rehearsal)
    recorder = InterventionRecorder(context, loop, memory=MAX_DELAY + 2)
    recovery = Recovery(
        context,
        rehearsal,
        recorder,
        carried_out_by[ReduceLR.step],
        carried_out_by[ClipGradients.step],
        may_lower=any(remedy.role == "rate" for remedy in remedies),
    )
    settings = context.settings
    snapshots = SnapshotManager(
        context.learner,
        context.ring,
        investigator,
        every=settings.snapshot_every,
        device=settings.snapshot_device,
        choose=settings.choose_place,
        ranks=context.ranks,
    )
    meter = Meter(context.learner, loop.micro_batches, several=not context.replay.comparable())
    blocker = StepBlocker(context.learner)
    caution = Caution(context, blocker)
    readback = _readback(context, meter, caution, blocker, snapshots)
    conduct: Conduct = Observing(context)
    if not settings.observe:
        actions = RemedyActions(context, recovery, rehearsal, blocker, snapshots, readback)
        conduct = Acting(
            context, actions, carried_out_by, recovery, blocker, investigator, snapshots, readback
        )  # fmt: skip
    parts: dict[str, Any] = {
        "interventions": Interventions(context, loop, policy, investigator, recorder, conduct, carried_out_by),
        "certification": Certification(context, loop, investigator, snapshots),
        "saving": Saving(
            context.learner, context.ring, investigator, recorder.note, observe=settings.observe, ranks=context.ranks
        ),
        "undos": deque(make_undo() for _ in range(readback.open_batches())),
    }
    return Guard(
        GuardParts(
            context=context,
            loop=loop,
            meter=meter,
            readback=readback,
            caution=caution,
            blocker=blocker,
            snapshots=snapshots,
            investigator=investigator,
            conduct=conduct,
            recovery=recovery,
            recorder=recorder,
            **parts,
        )
    )


def _readback(
    context: GuardContext, meter: Meter, caution: Caution, blocker: StepBlocker, snapshots: SnapshotManager
) -> Readback:
    # By the loss only where there is one process: among ranks losses differ.
    readings = DeferredReadings(context.learner, by_loss=not context.many, observe=context.settings.observe)
    if context.many:
        return RankReadback(context, meter, readings, caution, blocker, snapshots)
    if context.settings.deferred:
        return DeferredReadback(meter, context.state, readings, caution)
    return StepReadback(meter, context.state)
