"""The callback ``NaNGuard``, which calls the guard from Lightning's hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.diagnosis.rule_set import Rule
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.record.base import Sink
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.arguments import Arguments, switched
from lightning_nanguard.trainer.failsafe import leaves_run_if_it_fails, run_micro_batch
from lightning_nanguard.trainer.fit import Fit
from lightning_nanguard.trainer.guard_display import DisplayedGuard
from lightning_nanguard.trainer.guard_state import allow_in_checkpoints
from lightning_nanguard.trainer.loggers import log_settings
from lightning_nanguard.trainer.never_called import expect_hooks, hooks_called
from lightning_nanguard.trainer.private.averages import swaps_weights
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, rank_zero_info
from lightning_nanguard.trainer.private.strategies import check_strategy
from lightning_nanguard.types import ActOn, Fault, Intervention

_logger = logging.getLogger("lightning_nanguard")


@contextmanager
def _ending() -> Iterator[None]:
    """Inside, log an exception of the guard, because the user must see the one that ended the run."""
    try:
        yield
    except Exception as error:
        _logger.error("NaNGuard failed while the run was ending: %s", error, exc_info=error)


@final
class NaNGuard(DisplayedGuard):
    """Keeps a training run alive when the loss or the gradients become NaN, infinite or far too large.

    The guard measures loss and gradient norm before each optimizer step. It skips bad batches, goes back to the last
    good state if the weights are bad, and lowers the learning rate or turns clipping on if the run diverges. It
    records what it did. If it cannot save the run, it stops it with the last good weights in the module. A healthy run
    is the same, bit for bit, with and without the guard.

    Args:
        detectors: The detectors that find faults, called in this order; ``None`` for :class:`NonFinite`,
            :class:`GradientSpike` and :class:`DivergingLoss` with their defaults.
        remedies: The remedies used if skipping the batch is not enough, in order of preference; ``None`` for
            :class:`Rollback`, :class:`ClipGradients` and :class:`ReduceLR`. With ``[]`` the guard only skips batches,
            with ``[StopTraining()]`` it stops the run.
        snapshot_every_n_steps: Number of updates between snapshots of weights, buffers and optimizer state. With
            ``"auto"`` snapshots take at most 1 % of the run's time, and less in longer runs.
        snapshot_device: Where snapshots are kept: ``"same"`` on the device of the weights; ``"cpu"`` in host memory
            (pinned if the weights are on a CUDA device, so that the copy runs beside the next forward and backward);
            ``"auto"`` on the device of the weights if there is room at the run's peak, else in host memory.
        max_snapshots: Number of certified snapshots kept. One more may be pending.
        max_snapshot_memory: Limit in GiB for all snapshots and the batches that are kept. If they do not fit, fewer
            snapshots are kept, but at least one.
        budget: Limits on interventions. The run is stopped when one is exceeded.
        dirpath: Folder of the records and of the last good checkpoint; ``None`` for ``nanguard`` beside the checkpoints
            of the trainer's logger, or ``nanguard/<run id>`` without a logger. If the folder belongs to another run,
            the guard uses a folder below it.
        readback: ``"step"`` reads each update's loss and gradient norm before the step; ``"deferred"`` reads them up
            to two steps later without waiting for the device; ``"auto"`` is ``"deferred"`` on CUDA with optimizers
            that can skip on the device (``fused=True``), else ``"step"``.
        observe: Record what would be done, and change nothing.
        preflight: Check the data and the untrained model before the first step, with the first batch, and give
            advice. It changes nothing.
        examine_after: Number of updates after which a loss that is high and has not fallen is examined (vanishing
            gradients, dead units, oscillation, a saddle point, …). It gives advice and changes nothing. At least 16.
        bundle_dir: Folder for the batch and the state of up to ten incidents, which ``nanguard replay`` runs again on
            another machine. They hold data of the run. ``None`` saves none. Needs the extra ``bundle``.
        on_intervention: Called with each :class:`Intervention`, on every rank.
        last_good_every_n_steps: Number of updates between writes of ``nanguard-last-good.ckpt``, a whole checkpoint. It
            replaces the older one only when its state is certified; ``None`` writes none.
        resume: What to do with a ``ckpt_path`` that is poisoned (not finite) or torn (damaged): ``"strict"`` raises
            :class:`BadCheckpointError`, ``"last-good"`` resumes from the newest good checkpoint of the same run.
        sinks: Where records go in addition to the guard's own files, the loggers and the console: instances of
            :class:`Sink`, or functions that are called with each :class:`Intervention` on rank 0.
        rules: Your own diagnosis rules, called together with the built-in ones: functions that take a :class:`Case`
            and return a :class:`Finding` or ``None``.
        thresholds: Every number by which the guard decides; ``None`` for
            :class:`~lightning_nanguard.thresholds.Thresholds` with its defaults. Detectors and remedies that you list
            keep their own.
        act_on: When the guard changes the run. ``"certain"``: for numbers that are not finite, that overflow their
            number format, or that are far larger than all before. Other suspicions become advice, and
            ``training_step`` is never run again while every number is finite. ``"evidence"``: also for a finite loss
            that diverges or does not fall, if a trial at lower rates confirms it.
        quarantine: Leave samples that were found to be bad out of every later batch, in this run and in runs that
            resume from its checkpoints. Their batches become smaller; the number of batches and the order of the other
            samples do not change. Samples without rows are recognised by their hash, in batches of ``default_collate``.

    Raises:
        ValueError: If an argument is out of its range or contradicts another.
        TypeError: If a detector, remedy, sink, rule, budget, threshold or callable has the wrong type.
        ModuleNotFoundError: If ``bundle_dir`` is given and safetensors is not installed.

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
        super().__init__(Arguments.of(locals()))  # all arguments, by name
        expect_hooks(self)
        self._unwatched = False

    # ------------------------------------------------------------------------------------------------ what users call

    def examine(self) -> None:
        """Examine the run at the end of the present batch. The findings are in :attr:`advice` and ``advice.jsonl``.

        Under manual optimization and with several processes a batch cannot be run again, and nothing is found.

        Raises:
            RuntimeError: If no fit is running.
        """
        if self._fit is None:
            raise RuntimeError("NaNGuard.examine() examines a run: call it during a fit.")
        self._fit.diagnostics.asked = True

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the first callback, and check the checkpoint to resume from.

        Raises:
            ValueError: If the strategy is not supported.
        """
        hooks_called(self)
        if stage == "fit":
            given = self._given = switched(self._arguments)
            if given is None:
                return
            check_strategy(trainer, pl_module)
            log_settings(trainer, self._settings())
            self._before.install(trainer, pl_module, self, given)

    @leaves_run_if_it_fails
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the guard of this fit and check the state before the first update."""
        given = self._given
        if given is None:
            return
        resumed, self._resumed = self._resumed, {}
        order = self._before.order or self._before.watch_data(trainer, given)
        run_id, settings = resumed.get("run"), self._settings()
        fit = self._fit = Fit(trainer, pl_module, given, self._memory, order, run_id, settings)
        if "guard" in resumed:
            fit.guard.load_state_dict(resumed["guard"])
        self._memory.begin_fit({"id": fit.folder.run_id, "folder": str(fit.folder.path)}, fit.guard.updates)
        fit.start(lambda callback: callback is self, partial(run_micro_batch, self, trainer))
        instead = self._before.end_resuming()
        if instead is not None:
            fit.guard.note(Fault("bad_checkpoint", "state", "ckpt_path", None, instead), "resume")

    def _guard_other_optimizers(self, fit: Fit, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on as in a resumed run. Snapshots from before do not fit the new optimizers."""
        rank_zero_info(
            "NaNGuard: the optimizers were replaced. The new ones are guarded, and snapshots from before are dropped."
        )
        fit.guard.check()
        self._resumed = {"guard": fit.guard.state_dict(), "run": fit.folder.run_id}
        before = self._memory.run.get("before")
        fit.close()
        self.on_train_start(trainer, pl_module)
        self._memory.add_to_run(before=before)  # it is still the same fit

    @leaves_run_if_it_fails
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy what the batch may change."""
        if self._fit is not None and self._fit.has_other_optimizers() and not self._fit.guard.in_window:
            self._guard_other_optimizers(self._fit, trainer, pl_module)
        fit = self._fit
        if fit is None:
            self._say_unwatched()
            return
        fit.replay.batch, fit.replay.batch_idx, fit.replay.epoch = batch, batch_idx, trainer.current_epoch
        if fit.diagnostics.preflight_due:
            fit.diagnostics.preflight(batch)
        fit.averages.watch()
        clock = trainer.global_step, fit.replay.epoch
        fit.replay.batches.add(fit.guard.updates + 1, batch_idx, batch, fit.order.origin(batch_idx), clock)
        if fit.diagnostics.first_updates is not None:
            fit.diagnostics.first_updates.see_batch(batch, batch_idx)
        fit.guard.open_batch()
        if fit.carried is not None:
            fit.carried.open()
            fit.replay.batches.note_contents()

    @leaves_run_if_it_fails
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep a reference to the loss."""
        fit = self._fit
        if fit is None:
            return
        if fit.diagnostics.first_updates is not None:
            fit.diagnostics.first_updates.see_loss(loss)
        fit.guard.see_loss(loss)

    @leaves_run_if_it_fails
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, detect, and skip a bad update."""
        fit = self._fit
        index = None if fit is None else fit.optimizer_index(optimizer)
        if fit is not None and index is not None:
            if fit.diagnostics.first_updates is not None:
                fit.diagnostics.first_updates.see_step(index)
            with fit.replay.batches.as_begun():
                fit.guard.before_step(index)

    @leaves_run_if_it_fails
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, act, record; certify and take snapshots."""
        fit = self._fit
        if fit is None:
            return
        guard, replay = fit.guard, fit.replay
        replay.batch, replay.batch_idx = batch, batch_idx
        if fit.carried is not None:
            fit.carried.close()
        if fit.last_good is not None and fit.last_good.due(guard.updates):
            guard.want_snapshot()
        try:
            with fit.numbers.at_batch_end(), replay.batches.as_begun():
                if guard.close_batch():
                    replay.remember(guard.updates)
                else:
                    replay.distrust(guard.updates)
                    fit.after_skip()
                if trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step:
                    guard.look()  # before means over the epoch are logged
                fit.diagnostics.end_batch()
        finally:
            replay.batch = None
            if not guard.in_window:
                replay.batches.clear()

    @leaves_run_if_it_fails
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a batch that an ``on_train_batch_start`` hook refused by returning -1, which ends the epoch."""
        if self._fit is not None:
            self._fit.end_epoch()

    @leaves_run_if_it_fails
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store on the device whether the validation loss is finite."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.validation.see(outputs)

    @leaves_run_if_it_fails
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the state before it is validated, and before averaged weights replace it."""
        fit = self._fit
        if fit is None or trainer.sanity_checking:
            return
        swaps = swaps_weights(trainer)
        # With uneven data other ranks may not validate now. Without a guarded update there is nothing to go back to.
        if swaps or (fit.guard.updates and not fit.context.many):
            fit.guard.check()
        fit.guard.swapped = swaps

    @leaves_run_if_it_fails
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle a validation loss that was not finite, before a checkpoint is saved because of it."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.validation.judge()  # averaged weights may still be in place
            self._fit.guard.swapped = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore a good state before the run ends."""
        self._before.end_resuming()
        fit = self._fit
        if fit is None:
            self._before.leave_data()
            return
        with _ending():
            fit.context.rate.withdraw()
            fit.guard.leave()
            if not isinstance(exception, TrainingDivergedError) and not fit.guard.swapped:
                fit.guard.check()  # checkpoints because of the exception are saved after this hook
        with _ending():
            self._end()  # Lightning calls no teardown after an exception

    @leaves_run_if_it_fails
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last readings, restore a good state if needed, and sum the counts of all ranks."""
        if self._fit is not None:
            self._fit.say_if_unseen()  # what ends the run now may be what could not be guarded
            self._fit.guard.finish()
            self._fit.diagnostics.judge_first_updates()
            self._memory.add_to_run(non_finite_rate=self._fit.non_finite_rate())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the summary line, and release the trainer and the module."""
        with _ending():
            self._end()

    def _end(self) -> None:
        self._before.close()
        for name in ("log", "log_dict"):  # Lightning leaves the module's here, which would keep it alive
            vars(self).pop(name, None)
        fit, self._fit = self._fit, None
        if fit is None:
            return
        try:
            self._multiplier = fit.context.rate.ratio()
            self._memory.add_to_run(updates=fit.guard.updates, lr_multiplier=self._multiplier)
            self._last_state = fit.guard.state_dict()
            fit.say_how_it_went()
        finally:
            fit.close()

    def _say_unwatched(self) -> None:
        if self._given is not None and not self._unwatched:
            self._unwatched = True
            _logger.info(
                "NaNGuard: a batch was trained outside of a fit, or in a fit that began before the guard was added, so "
                "the guard does not check its update."
            )


allow_in_checkpoints(NaNGuard)
