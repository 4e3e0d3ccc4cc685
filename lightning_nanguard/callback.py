"""NaNGuard: Lightning's hooks, translated for the guard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.checkpoints.resume_gate import ResumeGate
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.diagnosis.rule_set import Rule, check_rules
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.callable_sink import CallableSink, as_sinks
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.build import build_fit
from lightning_nanguard.trainer.fit import Fit
from lightning_nanguard.trainer.guard_copies import NO_RUN, allow_in_checkpoints
from lightning_nanguard.trainer.guard_display import DisplayedGuard
from lightning_nanguard.trainer.logger_settings import log_settings
from lightning_nanguard.trainer.never_called import expect_hooks, hooks_called
from lightning_nanguard.trainer.private.averages import swaps_weights
from lightning_nanguard.trainer.private.callbacks import put_first
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.resuming import before_resuming
from lightning_nanguard.trainer.private.strategies import check_strategy
from lightning_nanguard.trainer.switch import switched
from lightning_nanguard.types import ActOn, Fault, Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class NaNGuard(DisplayedGuard):
    """Keeps a training run alive through NaN and divergence.

    It sees a non-finite or diverging loss or gradient, keeps it from the weights, goes back to the last good state if
    the weights are already lost, lowers the learning rate or turns clipping on if the run itself is at fault, and
    writes down what it did. When it cannot help, it stops the run with the last good weights in place. A healthy run
    is the same bit for bit with and without it.

    Args:
        detectors: What counts as a fault, asked in this order; ``None`` for :class:`NonFinite`,
            :class:`GradientSpike` and :class:`DivergingLoss` with their defaults.
        remedies: What may follow when skipping the batch is not enough, in order of preference; ``None`` for
            :class:`Rollback`, :class:`ClipGradients` and :class:`ReduceLR`. ``[]`` only skips,
            ``[StopTraining()]`` stops.
        snapshot_every_n_steps: Updates between snapshots of the learner; ``"auto"`` keeps them at 1 % of the run's
            time at most, and at less and less as a run goes on without a fault.
        snapshot_device: Where snapshots lie: ``"same"`` beside the weights; ``"cpu"`` in host memory (pinned, where the
            weights are on a CUDA device: the copy goes on beside the next forward and backward); ``"auto"`` beside the
            weights as far as the run leaves room there at its peak, else in host memory.
        max_snapshots: Certified snapshots kept (one more is always pending).
        max_snapshot_memory: Limit in GiB for what all snapshots take, and batches that are kept; fewer snapshots are
            kept where they do not fit, at least one.
        budget: Bounds on interventions, past which the run is stopped.
        dirpath: Folder of the records and of the last good checkpoint; ``None`` for ``nanguard`` beside the checkpoints
            of the trainer's logger, or ``nanguard/<run id>`` without one. A folder that belongs to another run is left
            alone: the run then takes one below it.
        readback: ``"step"`` reads each update's loss and gradient norm before the step; ``"deferred"`` reads them up
            to two steps later without waiting for the device; ``"auto"`` takes ``"step"`` on CPU, ``"deferred"`` on
            CUDA with an optimizer that can skip on the device (``fused=True``), else ``"step"``.
        observe: Record what would be done and change nothing.
        preflight: Look at the data and the untrained model before the first step, with the first batch, and give
            advice; it changes nothing.
        examine_after: Updates after which a loss that has not moved, at a high level, is examined for what keeps it
            there (vanishing gradients, dead units, oscillation, a saddle point, …): advice, and no trace. At least 16.
        bundle_dir: Folder where the batch and the state of up to ten incidents are kept, to be replayed elsewhere with
            ``nanguard replay``; they hold data of the run. ``None`` keeps none. Needs the extra ``bundle``.
        on_intervention: Called with each :class:`Intervention`, on every rank.
        last_good_every_n_steps: Updates between writes of ``nanguard-last-good.ckpt``, a whole checkpoint that takes
            the place of the older one only when its state was certified; ``None`` writes none.
        resume: What to do with a ``ckpt_path`` that is poisoned or torn: ``"strict"`` raises
            :class:`BadCheckpointError`, ``"last-good"`` goes on from the newest good checkpoint of the same run.
        sinks: Where records go beside the guard's own files, loggers and console: instances of :class:`Sink`, or
            functions that are called with each :class:`Intervention` on rank 0.
        rules: Diagnosis rules of your own, asked beside the built-in ones: functions that take a :class:`Case` and
            return a :class:`Finding` or ``None``.
        thresholds: Every number that decides something; ``None`` for :class:`~lightning_nanguard.thresholds.Thresholds`
            with its defaults. Detectors and remedies that you list keep their own.
        act_on: For what the guard changes the run. ``"certain"``: for what is not finite, overflows its number format,
            or is out of all proportion to everything seen; a finite suspicion becomes advice, and ``training_step`` is
            never run again while every number is finite. ``"evidence"``: also for a finite loss that diverges or never
            falls, where the newest batches, run again under an earlier state or another rate, confirm it.
        quarantine: Leave samples that were found to be bad out of every later batch, in this run and in those that go
            on from its checkpoints. Batches that hold one get smaller; their number and the order of the other samples
            stay. Where data have no rows, samples are recognised by their hash, in batches of ``default_collate``.

    Raises:
        ValueError: When an argument is out of its range or contradicts another.
        TypeError: When a detector, remedy, sink, rule, budget, threshold or callable has the wrong type.
        ModuleNotFoundError: When ``bundle_dir`` is given and safetensors is not installed.

    Example:
        >>> guard = NaNGuard(snapshot_every_n_steps=50)
        >>> len(guard.interventions), guard.lr_multiplier
        (0, 1.0)
    """

    def __init__(
        self,
        detectors: list[Detector] | None = None,
        remedies: list[Remedy] | None = None,
        snapshot_every_n_steps: int | Literal["auto"] = "auto",
        snapshot_device: Literal["auto", "same", "cpu"] = "auto",
        max_snapshots: int = 3,
        max_snapshot_memory: float | None = None,
        budget: Budget | None = None,
        dirpath: str | Path | None = None,
        readback: Literal["auto", "step", "deferred"] = "auto",
        observe: bool = False,
        preflight: bool = False,
        examine_after: int | None = None,
        bundle_dir: str | Path | None = None,
        on_intervention: Callable[[Intervention], Any] | None = None,
        last_good_every_n_steps: int | None = None,
        resume: Literal["strict", "last-good"] = "strict",
        sinks: list[Sink | Callable[[Intervention], Any]] | None = None,
        rules: list[Rule] | None = None,
        thresholds: Thresholds | None = None,
        act_on: ActOn = "certain",
        quarantine: bool = False,
    ) -> None:
        if on_intervention is not None and not callable(on_intervention):
            raise TypeError(f"NaNGuard(on_intervention={on_intervention!r}): expected a callable.")
        own = [] if on_intervention is None else [CallableSink(on_intervention, every_rank=True)]
        limits = Thresholds() if thresholds is None else thresholds
        if not isinstance(limits, Thresholds):
            raise TypeError(
                f"NaNGuard(thresholds={limits!r}): expected Thresholds, whose groups are its fields, as in "
                "Thresholds(detection=…)."
            )
        arguments = Arguments(
            detectors=default_detectors(limits.detection) if detectors is None else detectors,
            remedies=default_remedies(limits.rate_search.cut) if remedies is None else remedies,
            snapshot_every_n_steps=snapshot_every_n_steps,
            snapshot_device=snapshot_device,
            max_snapshots=max_snapshots,
            max_snapshot_memory=max_snapshot_memory,
            budget=Budget() if budget is None else budget,
            dirpath=None if dirpath is None else Path(dirpath),
            readback=readback,
            observe=observe,
            preflight=preflight,
            examine_after=examine_after,
            bundle_dir=None if bundle_dir is None else Path(bundle_dir),
            last_good_every_n_steps=last_good_every_n_steps,
            resume=resume,
            act_on=act_on,
            quarantine=quarantine,
            sinks=(*own, *as_sinks(self, sinks)),
            rules=check_rules(rules),
            thresholds=limits,
        )
        super().__init__(arguments)
        expect_hooks(self)
        self._unwatched = False
        self._gate: ResumeGate | None = None

    # ------------------------------------------------------------------------------------------------ what users call

    def examine(self) -> None:
        """Examine the run at the end of the batch at hand; what is found is in :attr:`advice` then, and on record.

        Under manual optimization, and with several processes, a batch cannot be run again, and nothing is found.

        Raises:
            RuntimeError: Outside of a fit.
        """
        if self._fit is None:
            raise RuntimeError("NaNGuard.examine() looks at a run at hand: call it within a fit.")
        self._fit.diagnostics.asked = True

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the first place among the callbacks, and look at the checkpoint that is resumed from.

        Raises:
            ValueError: When the strategy is not supported.
        """
        hooks_called(self)
        if stage == "fit":
            given = self._given = switched(self._arguments)
            if given is None:
                return
            check_strategy(trainer, pl_module)
            self._put_back()
            self._put_back = put_first(trainer, self)
            log_settings(trainer, self._settings())
            self._undo_gate()
            self._gate = ResumeGate(
                pl_module,
                [] if given.dirpath is None else [given.dirpath],
                take=given.resume == "last-good",
                observe=given.observe,
                thresholds=given.thresholds.checkpoints,
            )
            self._undo_gate = before_resuming(trainer, self._gate)
            self._watch_data(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the guard of this fit and look at the state before the first update."""
        given = self._given
        if given is None:
            return
        resumed, self._resumed_run = self._resumed_run, None
        order = self._order or self._watch_data(trainer)
        fit = self._fit = build_fit(trainer, pl_module, given, self._memory, order, resumed, self._settings())
        self._run_id = fit.folder.run_id
        self._memory.take_run({"id": fit.folder.run_id, "folder": str(fit.folder.path)})
        self._memory.take_advice(fit.advice.given, fit.context.receipts.given)
        fit.diagnostics.preflight_due = given.preflight and trainer.global_step == 0
        self._before = self._counts()
        if self._resumed is not None:
            fit.guard.load_state_dict(self._resumed)
            self._resumed = None
        fit.start(given.max_snapshot_memory, lambda callback: callback is self)
        if given.last_good_every_n_steps is not None:
            fit.keep_last_good(given.last_good_every_n_steps)
        self._note_resumed(fit)

    def _note_resumed(self, fit: Fit) -> None:
        self._undo_gate()
        gate, self._gate = self._gate, None
        if gate is not None and gate.taken is not None:
            message = f"{gate.refused}; the run goes on from {gate.taken.path} of step {gate.taken.global_step}"
            fit.guard.note(Fault("bad_checkpoint", "state", "ckpt_path", None, message), "resume")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the batch may change."""
        fit = self._fit
        if fit is None:
            self._say_unwatched()
            return
        fit.replay.batch, fit.replay.batch_idx = batch, batch_idx
        if fit.diagnostics.preflight_due:
            fit.diagnostics.preflight(batch)
        fit.averages.watch()
        fit.replay.batches.add(fit.guard.updates + 1, batch_idx, batch, fit.order.origin(batch_idx))
        if fit.diagnostics.first_updates is not None:
            fit.diagnostics.first_updates.see_batch(batch)
        fit.guard.open_batch()
        if fit.carried is not None:
            fit.carried.open()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the loss."""
        fit = self._fit
        if fit is None:
            return
        if fit.diagnostics.first_updates is not None:
            fit.diagnostics.first_updates.see_loss(loss)
        fit.guard.see_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, detect, and block a bad update."""
        fit = self._fit
        index = None if fit is None else fit.optimizer_index(optimizer)
        if fit is not None and index is not None:
            if fit.diagnostics.first_updates is not None:
                fit.diagnostics.first_updates.see_step(index)
            fit.guard.before_step(index)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, act, record; certify and take snapshots."""
        fit = self._fit
        if fit is None:
            return
        guard, replay = fit.guard, fit.replay
        replay.batch, replay.batch_idx = batch, batch_idx
        replay.may_log = True
        if fit.carried is not None:
            fit.carried.close()
        if fit.last_good is not None and fit.last_good.due(guard.updates):
            guard.want_snapshot()
        try:
            if guard.close_batch():
                replay.remember(guard.updates)
            else:
                replay.distrust(guard.updates)
            if replay.to_log is not None:
                replay.to_log()
                replay.to_log = None
            fit.diagnostics.examine_if_due()
            if fit.diagnostics.first_updates is not None and fit.diagnostics.first_updates.end_batch():
                fit.diagnostics.judge_first_updates()
        finally:
            replay.may_log = False
            replay.batch = None
            if not guard.in_window:
                replay.batches.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a batch that ``on_train_batch_start`` has refused with -1, which ends the epoch."""
        if self._fit is not None:
            self._fit.end_epoch()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note on the device whether the validation loss is finite."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.validation.see(outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the state before averages take its place."""
        if self._fit is not None and swaps_weights(trainer):
            self._fit.guard.check()
            self._fit.guard.swapped = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look into a validation loss that was not finite, before anything is saved on its account."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.guard.swapped = False
            self._fit.validation.judge()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a good state behind."""
        self._undo_gate()
        fit = self._fit
        if fit is None:
            self._leave_data()
            return
        try:
            fit.context.rate.withdraw()
            fit.guard.leave()
            if not isinstance(exception, TrainingDivergedError) and not fit.guard.swapped:
                fit.guard.check()  # what is saved on its account comes after this hook
        except Exception as error:
            # Whatever ended the run must be what the user sees.
            _logger.error("NaNGuard failed while the run was ending: %s", error, exc_info=error)
        try:
            self._end()  # Lightning calls no teardown after an exception
        except Exception as error:
            _logger.error("NaNGuard failed while the run was ending: %s", error, exc_info=error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is still on its way, leave a good state, and count over all ranks."""
        if self._fit is not None:
            self._fit.say_if_unseen()  # what ends the run now may be what could not be guarded
            self._fit.guard.finish()
            self._fit.diagnostics.judge_first_updates()
            self._memory.add_to_run(non_finite_rate=self._fit.non_finite_rate())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say in one line what happened, and let go of the fit."""
        self._end()

    def _end(self) -> None:
        self._undo_gate()
        self._put_back()
        self._leave_data()
        for name in ("log", "log_dict"):  # Lightning leaves the module's here, which would keep it alive
            vars(self).pop(name, None)
        fit = self._fit
        vars(self).update(NO_RUN)
        if fit is None:
            return
        try:
            self._multiplier = fit.context.rate.ratio()
            self._memory.add_to_run(updates=fit.guard.updates, lr_multiplier=self._multiplier)
            self._last_state = fit.guard.state_dict()
            faults, remedies = (now - then for now, then in zip(self._counts(), self._before, strict=True))
            fit.say_how_it_went(faults, remedies)
        finally:
            fit.close()

    def _say_unwatched(self) -> None:
        if self._given is not None and not self._unwatched:
            self._unwatched = True
            _logger.info(
                "NaNGuard: a batch is trained on outside of a fit, or in one that began before the guard was added, so "
                "its update is not guarded."
            )


allow_in_checkpoints(NaNGuard)
