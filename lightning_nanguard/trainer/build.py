"""Builds a guarded fit from its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.act.skip_step import SkipStep
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.distributed.group import Group
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess
from lightning_nanguard.guard.build import build_guard
from lightning_nanguard.guard.context import GuardContext, Settings
from lightning_nanguard.guard.readback import MAX_DELAY
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.record.base import RunInfo
from lightning_nanguard.record.curve import CURVE_FILE, CurveFile
from lightning_nanguard.record.known_samples import KnownSamples
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.diagnostics import Diagnostics
from lightning_nanguard.trainer.fit import Fit
from lightning_nanguard.trainer.loggers.numbers import LoggerNumbers
from lightning_nanguard.trainer.loggers.settings import begun_with
from lightning_nanguard.trainer.loop import TrainerLoop
from lightning_nanguard.trainer.private.averages import AveragedCopies
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.precision import grad_scaler
from lightning_nanguard.trainer.private.strategies import is_sharded, what_steps
from lightning_nanguard.trainer.run import open_run
from lightning_nanguard.trainer.sample_finder import SampleFinder
from lightning_nanguard.trainer.sample_keeper import SampleKeeper
from lightning_nanguard.trainer.sinks import fit_advice, fit_outcomes, fit_sinks


def build_fit(
    trainer: Trainer,
    module: LightningModule,
    arguments: Arguments,
    memory: Memory,
    order: DataOrder,
    run_id: str | None,
    settings: Mapping[str, Any],
) -> Fit:
    """Make one fit and its guard.

    Args:
        trainer: The trainer.
        module: Its module.
        arguments: The arguments of the guard.
        memory: Keeps interventions from one fit to the next.
        order: Gives the rows of each batch, and leaves out rows that are known to be bad.
        run_id: Id of the run that is resumed; ``None`` for a new one.
        settings: Settings of the guard, for the log of the run.
    """
    info, folder = open_run(
        trainer, arguments.dirpath, run_id, **begun_with(trainer, module, settings, arguments.thresholds.records)
    )
    curve = CurveFile(folder.path / CURVE_FILE, arguments.thresholds.records) if folder.keeps_files else None
    context, replay, averages = _context(trainer, module, arguments, curve, order.known, info)
    numbers = LoggerNumbers(trainer, module, memory, context)
    sinks = fit_sinks(trainer, info, memory, arguments.sinks, context, numbers)
    advice = fit_advice(info, arguments.thresholds.records)
    finder = SampleFinder(trainer, module, context, replay, order, info)
    diagnostics = Diagnostics(trainer, module, context, replay, arguments, advice=advice, finder=finder)
    guard = build_guard(
        context,
        TrainerLoop(trainer, module, replay, diagnostics, sinks, info.run_id),
        policy=Policy(arguments.remedies, arguments.budget, arguments.thresholds.decision, arguments.thresholds.trial),
        remedies=arguments.remedies,
        make_undo=replay.make_undo,
        schedulers={
            index: type(config.scheduler).__name__
            for config in trainer.lr_scheduler_configs
            for index, optimizer in enumerate(trainer.optimizers)
            if getattr(config.scheduler, "optimizer", None) is optimizer
        },
    )
    keeps_good = next((one.keep_good_samples for one in arguments.remedies if isinstance(one, SkipStep)), None)
    keeper = None if keeps_good is False else SampleKeeper(module, replay, finder, guard, always=bool(keeps_good))
    return Fit(
        trainer, arguments, guard, replay, diagnostics, sinks, numbers, advice, folder, averages, order, finder, keeper
    )


def _context(
    trainer: Trainer,
    module: LightningModule,
    arguments: Arguments,
    curve: CurveFile | None,
    known: KnownSamples,
    info: RunInfo,
) -> tuple[GuardContext, TrainerBatchReplay, AveragedCopies]:
    receipts, trials = fit_outcomes(info, arguments.thresholds.records)
    sharded = is_sharded(trainer)
    ranks: Ranks = (
        Group(sharded=sharded, thresholds=arguments.thresholds.distributed)
        if trainer.world_size > 1
        else SingleProcess(sharded=sharded)
    )
    optimizers, partitions = what_steps(trainer, module)
    averages = AveragedCopies(trainer, module, arguments.thresholds.checkpoints)
    learner = Learner(
        module,
        optimizers,
        scaler=grad_scaler(trainer),
        averages=averages,
        partitions=partitions,
    )
    clipper = Clipper(arguments.thresholds.measurement)
    deferred = _deferred(arguments.readback, trainer, module)
    # With deferred readback a fault belongs to an earlier batch.
    late = deferred or ranks.world > 1
    replay = TrainerBatchReplay(
        trainer,
        module,
        learner,
        ranks,
        clipper,
        delay=MAX_DELAY if late else 0,
        examined=arguments.examine_after is not None,
        thresholds=arguments.thresholds.batches,
    )
    context = GuardContext(
        learner=learner,
        replay=replay,
        monitors=Monitors(arguments.detectors, arguments.thresholds.detection),
        rate=LearningRate(optimizers),
        clipper=clipper,
        ring=Ring(arguments.max_snapshots, arguments.thresholds.snapshots.ring),
        ranks=ranks,
        settings=_settings(arguments, deferred=deferred),
        thresholds=arguments.thresholds,
        norms=NormHistory(arguments.thresholds.measurement),
        curve=curve,
        samples=known,
        receipts=receipts,
        trials=trials,
    )
    return context, replay, averages


def _settings(arguments: Arguments, *, deferred: bool) -> Settings:
    every, limit = arguments.snapshot_every_n_steps, arguments.max_snapshot_memory
    return Settings(
        snapshot_every=None if isinstance(every, str) else every,
        snapshot_device=torch.device("cpu") if arguments.snapshot_device == "cpu" else None,
        snapshot_bytes=math.inf if limit is None else limit * 2**30,
        choose_place=arguments.snapshot_device == "auto",
        deferred=deferred,
        observe=arguments.observe,
        act_on=arguments.act_on,
    )


def _deferred(readback: str, trainer: Trainer, module: LightningModule) -> bool:
    if readback != "auto":
        return readback == "deferred"
    fused = all(map(skips_on_device, trainer.optimizers))
    return module.device.type == "cuda" and fused and grad_scaler(trainer) is None
