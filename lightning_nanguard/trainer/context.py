"""Builds the objects that the parts of the guard of one fit share."""

from __future__ import annotations

import math

import torch

from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.distributed.group import Group
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess
from lightning_nanguard.guard.context import GuardContext, Settings
from lightning_nanguard.guard.readback import MAX_DELAY
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.record.bad_samples import KnownSamples
from lightning_nanguard.record.base import RunInfo
from lightning_nanguard.record.curve import CurveFile
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.averages import AveragedCopies
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.strategies import grad_scaler, is_sharded, what_steps
from lightning_nanguard.trainer.sinks import fit_outcomes


def fit_context(
    trainer: Trainer,
    module: LightningModule,
    arguments: Arguments,
    curve: CurveFile | None,
    known: KnownSamples,
    info: RunInfo,
) -> tuple[GuardContext, TrainerBatchReplay, AveragedCopies]:
    """The context of a fit, and two of its parts with the methods that only a fit calls.

    Args:
        trainer: The trainer.
        module: Its module.
        arguments: The arguments of the guard.
        curve: Stores the readings of all updates; ``None`` stores none.
        known: The bad samples found so far.
        info: Facts about the fit.
    """
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
