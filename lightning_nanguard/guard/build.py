"""Puts the parts of a guard together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.act.defaults import default_remedies, executors
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.checkpoints.saving import SaveGuard
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess
from lightning_nanguard.guard.bad_start import BadStart
from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.beside import Beside
from lightning_nanguard.guard.branch import Branches
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.context import GuardContext, Settings
from lightning_nanguard.guard.control import Control
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.guard.hyperparameter_watch import HyperparameterWatch
from lightning_nanguard.guard.interventions import Interventions
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.late_redo import LateRedo
from lightning_nanguard.guard.local_readback import DeferredReadings, LocalReadback
from lightning_nanguard.guard.loop import BatchReplay, TrainingLoop
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.outlier_watch import OutlierWatch
from lightning_nanguard.guard.parts import GuardParts
from lightning_nanguard.guard.plan_runner import ActingRunner, ObservingRunner, PlanRunner
from lightning_nanguard.guard.rank_readback import RankReadback, Readback
from lightning_nanguard.guard.readback import MAX_DELAY
from lightning_nanguard.guard.reading_judge import ReadingJudge
from lightning_nanguard.guard.receipts import Receipts
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.guard.remedy_actions import RemedyActions
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.guard.step_parts import StepParts
from lightning_nanguard.guard.step_records import StepRecords
from lightning_nanguard.guard.suspicions import Suspicions
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.guard.unused_batch import UnusedBatch
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.device import Device
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.plausibility import PlausibilityCheck
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.types import PlanStep


def build_guard(
    context: GuardContext,
    loop: TrainingLoop,
    *,
    policy: Policy,
    remedies: Sequence[Remedy],
    make_undo: Callable[[], BatchUndo],
    schedulers: Mapping[int, str] | None = None,
) -> Guard:
    """Make a guard.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: The training loop.
        policy: Decides on a plan.
        remedies: The remedies used if skipping the batch is not enough, in order of preference.
        make_undo: Makes an object that undoes what a batch changed.
        schedulers: Name of each optimizer's scheduler, by the optimizer's index.
    """
    by_step = executors(remedies)
    rehearsal = Rehearsal(context)
    branches = Branches(context, rehearsal)
    control = Control(context, branches)
    trials = TrialRunner(context, branches, control, loop)
    investigator = Investigator(context, rehearsal, trials)
    recorder = InterventionRecorder(context, loop, memory=MAX_DELAY + 2)
    recovery = _recovery(context, rehearsal, recorder, remedies, by_step)
    plausibility = _plausibility(context, investigator)
    snapshots = SnapshotManager(context, plausibility)
    meter = _meter(context, loop)
    skipper = StepSkipper(context.learner, snapshots.placement.where)
    caution = Caution(context, skipper)
    readback = _readback(context, meter, caution, skipper, snapshots)
    actions = partial(RemedyActions, context, recovery, rehearsal, skipper, snapshots, readback)
    acting = ActingRunner(context, actions, by_step, skipper, plausibility, caution)
    runner: PlanRunner = ObservingRunner() if context.settings.observe else acting
    receipts = Receipts(context, branches, control, recorder, snapshots)
    beside = Beside(trials, receipts, branches, control)
    suspicions = Suspicions(context, loop, investigator, beside, recorder)
    interventions = Interventions(context, loop, policy, investigator, recorder, runner, by_step, receipts, suspicions)
    # With late readings a batch is judged up to two updates later.
    undos = BatchUndos(make_undo, MAX_DELAY + 2 if context.many or context.settings.deferred else 1)
    check = StepCheck(context, meter, caution, policy, undos, readback)
    records = StepRecords(context, loop, recorder, policy, readback)
    steps = StepParts(check, undos, records, UnusedBatch(context, meter, undos, records))
    late = LateRedo(context, steps, skipper, snapshots, caution)
    return Guard(
        GuardParts(
            context=context,
            loop=loop,
            meter=meter,
            readback=readback,
            caution=caution,
            skipper=skipper,
            snapshots=snapshots,
            plausibility=plausibility,
            bad_start=BadStart(context, undos),
            certification=Certification(context, loop, investigator, snapshots),
            investigator=investigator,
            judge=ReadingJudge(context, meter, runner, interventions, suspicions, plausibility, late),
            recovery=recovery,
            hyperparameters=HyperparameterWatch(context, skipper, recorder, schedulers or {}),
            outliers=OutlierWatch(context, loop),
            recorder=recorder,
            saving=_saving(context, recorder),
            beside=beside,
            steps=steps,
        )
    )


def _recovery(
    context: GuardContext,
    rehearsal: Rehearsal,
    recorder: InterventionRecorder,
    remedies: Sequence[Remedy],
    by_step: Mapping[type[PlanStep], Remedy],
) -> Recovery:
    reduce, clip = by_step[ReduceLR.step], by_step[ClipGradients.step]
    may_lower = any(remedy.role == "rate" for remedy in remedies)
    return Recovery(context, rehearsal, recorder, reduce, clip, may_lower=may_lower)


def _plausibility(context: GuardContext, investigator: Investigator) -> PlausibilityCheck:
    return PlausibilityCheck(
        context.learner,
        context.ring,
        investigator.is_worse,
        context.thresholds.snapshots.plausibility,
        certain_only=context.settings.act_on == "certain",
        largest_norm=lambda optimizer_index: context.monitors.history(optimizer_index).largest_norm(),
    )


def _meter(context: GuardContext, loop: TrainingLoop) -> Meter:
    return Meter(
        context.learner,
        loop.micro_batches,
        many_losses=not context.replay.comparable(),
        thresholds=context.thresholds.measurement,
        history=context.norms,
    )


def _saving(context: GuardContext, recorder: InterventionRecorder) -> SaveGuard:
    observe = context.settings.observe
    return SaveGuard(
        context.learner, context.ring, context.finite, recorder.note, observe=observe, ranks=context.ranks
    )  # fmt: skip


def guard_for(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    loop: TrainingLoop,
    *,
    replay: BatchReplay | None = None,
    detectors: Sequence[Detector] | None = None,
    remedies: Sequence[Remedy] | None = None,
    budget: Budget | None = None,
    settings: Settings | None = None,
    ranks: Ranks | None = None,
    thresholds: Thresholds | None = None,
    device: Device | None = None,
) -> Guard:
    """Make a guard for your own loop. ``None`` stands for the default of ``NaNGuard``.

    Args:
        module: The module trained.
        optimizers: Its optimizers, by the index that :meth:`Guard.before_step` is given.
        loop: The training loop.
        replay: Runs batches again; by default no batch can be run again.
        detectors: The detectors that find faults.
        remedies: The remedies used if skipping the batch is not enough, in order of preference.
        budget: Limits on interventions.
        settings: How the guard works.
        ranks: All processes; one by default.
        thresholds: All thresholds.
        device: The device of the run.
    """
    limits = thresholds or Thresholds()
    remedies = default_remedies(limits.rate_search.cut) if remedies is None else remedies
    detectors = default_detectors(limits.detection) if detectors is None else detectors
    context = GuardContext(
        learner=Learner(module, optimizers, device=device),
        replay=replay or BatchReplay(),
        monitors=Monitors(detectors, limits.detection),
        rate=LearningRate(optimizers),
        clipper=Clipper(limits.measurement),
        ring=Ring(thresholds=limits.snapshots.ring),
        ranks=ranks or SingleProcess(),
        settings=settings or Settings(),
        thresholds=limits,
    )
    policy = Policy(remedies, budget or Budget(), limits.decision, limits.trial)
    return build_guard(
        context,
        loop,
        policy=policy,
        remedies=remedies,
        make_undo=lambda: BatchUndo(module, thresholds=limits.batches.repeated),
    )


def _readback(
    context: GuardContext, meter: Meter, caution: Caution, skipper: StepSkipper, snapshots: SnapshotManager
) -> Readback:
    # The loss counts only with a single process, because the losses of ranks differ.
    observe = context.settings.observe
    readings = DeferredReadings(context.learner, context.state, by_loss=not context.many, observe=observe)
    if context.many:
        return RankReadback(context, meter, readings, caution, skipper, snapshots)
    return LocalReadback(meter, context.state, readings, caution)
