"""One guarded fit: the guard, and its parts on the trainer."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from operator import is_not
from typing import Any, final

from torch.optim import Optimizer

from lightning_nanguard.act.skip_step import SkipStep
from lightning_nanguard.checkpoints.last_good import LastGood
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.errors import SettingsError
from lightning_nanguard.guard.build import build_guard
from lightning_nanguard.measure.finite import all_finite
from lightning_nanguard.record.curve import CURVE_FILE, CurveFile
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.text import counted
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot_room import SnapshotSize
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.carried_attributes import CarriedAttributes
from lightning_nanguard.trainer.context import fit_context
from lightning_nanguard.trainer.diagnostics import Diagnostics
from lightning_nanguard.trainer.fit_summary import fit_summary, told_folder
from lightning_nanguard.trainer.loggers import LoggerCurves, LoggerNumbers, begun_with, log_report
from lightning_nanguard.trainer.loop import TrainerLoop
from lightning_nanguard.trainer.private.best_model import keep_best_finite
from lightning_nanguard.trainer.private.callbacks import (
    IsGuard,
    after_every_batch,
    around_learning_rate_monitors,
    is_from_callback,
)
from lightning_nanguard.trainer.private.closures import MicroBatchRun, run_micro_batches_by, skipped_steps_raise_nothing
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer, package_of, rank_zero_info
from lightning_nanguard.trainer.private.running_means import KeptNames
from lightning_nanguard.trainer.private.saving import catch_write_errors, guard_saves, write_checkpoint
from lightning_nanguard.trainer.private.strategies import step_only_accumulates
from lightning_nanguard.trainer.repeat.attempts import Attempts
from lightning_nanguard.trainer.repeat.numeric_errors import is_numeric, may_lack_gradients
from lightning_nanguard.trainer.repeat.step_runner import StepRunner
from lightning_nanguard.trainer.run import open_run
from lightning_nanguard.trainer.run_advice import fallen_scales
from lightning_nanguard.trainer.sample_finder import SampleFinder
from lightning_nanguard.trainer.sample_keeper import SampleKeeper
from lightning_nanguard.trainer.sinks import fit_advice, fit_sinks
from lightning_nanguard.trainer.validation import ValidationWatch
from lightning_nanguard.types import Finding

_logger = logging.getLogger("lightning_nanguard")


@final
class Fit:
    """One fit: its guard, and everything that is installed on the trainer and removed again.

    Args:
        trainer: The trainer.
        module: Its module.
        arguments: The arguments of the guard.
        memory: Keeps interventions from one fit to the next.
        order: Gives the rows of each batch, and leaves out rows that are known to be bad.
        run_id: Id of the run that is resumed; ``None`` for a new one.
        settings: Settings of the guard, for the log of the run.

    Attributes:
        last_good: Writes the last good checkpoint; ``None`` if none is written.
        carried: Undoes a skipped batch's changes to attributes; ``None`` but under manual optimization.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        arguments: Arguments,
        memory: Memory,
        order: DataOrder,
        run_id: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.trainer, self._arguments, self._memory, self.order = trainer, arguments, memory, order
        self.rank_zero = trainer.is_global_zero
        limits = arguments.thresholds
        begin = begun_with(trainer, module, settings, limits.records)
        info, self.folder = open_run(trainer, arguments.dirpath, run_id, **begin)
        curve = CurveFile(self.folder.path / CURVE_FILE, limits.records) if self.folder.keeps_files else None
        self.context, self.replay, self.averages = fit_context(trainer, module, arguments, curve, order.known, info)
        context, replay = self.context, self.replay
        self.numbers = LoggerNumbers(trainer, module, memory, context)
        self._sinks = fit_sinks(trainer, info, memory, arguments.sinks, context, self.numbers)
        self._advice = fit_advice(info, limits.records)
        self._finder = SampleFinder(trainer, module, context, replay, order, info)
        self.diagnostics = Diagnostics(
            trainer, module, context, replay, arguments, advice=self._advice, finder=self._finder
        )
        self.guard = build_guard(
            context,
            TrainerLoop(trainer, module, replay, self.diagnostics, self._sinks, info.run_id),
            policy=Policy(arguments.remedies, arguments.budget, limits.decision, limits.trial),
            remedies=arguments.remedies,
            make_undo=replay.make_undo,
            schedulers={
                index: type(config.scheduler).__name__
                for config in trainer.lr_scheduler_configs
                for index, optimizer in enumerate(trainer.optimizers)
                if getattr(config.scheduler, "optimizer", None) is optimizer
            },
        )
        self._names = KeptNames(trainer)
        self.validation = ValidationWatch(trainer, self.guard, replay, self._names)
        self.last_good: LastGood | None = None
        self.carried: CarriedAttributes | None = None
        self._unknown: set[int] = set()
        self._optimizers = list(trainer.optimizers)
        self._patches = ExitStack()
        memory.take_advice(self._advice.given, context.receipts.given, context.trials.given)

    def start(
        self, is_guard: IsGuard, failsafe: Callable[[Callable[[MicroBatchRun], Any], MicroBatchRun], Any]
    ) -> None:
        """Check the state before the first update, and install the guard on the trainer.

        Args:
            is_guard: Says whether a callback is the guard.
            failsafe: Calls a function of the guard with a micro-batch. If it fails, the run goes on without the guard.
        """
        self._sinks.open()
        self._say_what_is_not_guarded()
        if (known := self.order.known).quarantine and len(known):
            rows = counted(len(known), "bad sample")
            rank_zero_info(f"NaNGuard: {rows} that the run found before will be left out (quarantine=True).")
        self.guard.say_where(self._on_disk)
        self.guard.start()
        self._limit_memory(self._arguments.max_snapshot_memory)
        self._finder.offset = self.trainer.global_step - self.guard.updates
        if self.context.curve is not None:
            self.context.curve.offset = self._finder.offset
            self.context.curve.listener = LoggerCurves(self.trainer).take
        rate, replay, later = self.context.rate, self.replay, self._patches.callback
        module = self.trainer.lightning_module
        keeper = self._keeper(module)
        if module.automatic_optimization and self.context.learner.optimizers:
            runs = Attempts(self.trainer, module, self.guard, self.replay, is_guard, keeper)
            runner = StepRunner(runs)
            later(run_micro_batches_by(self.trainer, partial(failsafe, runner.run), runs.forward))
            replay.redo = runner.redo_since
            later(setattr, replay, "redo", None)
        elif not (module.automatic_optimization or self.context.settings.observe):
            self.carried = CarriedAttributes(module, self.guard)
        later(guard_saves(self.trainer, self.guard.before_save, self._mend, self.guard.after_save))
        if not self.context.settings.observe:
            later(skipped_steps_raise_nothing(self.trainer, partial(self._excuses, is_guard)))
            later(around_learning_rate_monitors(self.trainer, rate.apply, rate.withdraw))
            later(keep_best_finite(self.trainer))
        if self._arguments.last_good_every_n_steps is not None:
            self._keep_last_good(self._arguments.last_good_every_n_steps)

    def _excuses(self, is_guard: IsGuard, optimizer: Optimizer, error: Exception) -> bool:
        """Whether a skipped update caused an exception. An exception from a callback never counts."""
        numeric = is_numeric(error)
        possible = (numeric or may_lack_gradients(error)) and not is_from_callback(error, is_guard)
        return possible and self.guard.excuses(optimizer, numeric=numeric)

    def _keeper(self, module: LightningModule) -> SampleKeeper | None:
        """Gives the good samples of a bad batch; ``None`` if bad batches are skipped as a whole.

        If the user asked to keep good samples and it is not possible, a message says so.
        """
        wanted = next((one.keep_good_samples for one in self._arguments.remedies if isinstance(one, SkipStep)), None)
        if wanted is False:
            return None
        keeper = SampleKeeper(module, self.replay, self._finder, self.guard, always=bool(wanted))
        late = self.context.settings.deferred or not self.context.acts_alone or not module.automatic_optimization
        if not (late or self.context.learner.quasi_newton):
            return keeper
        if keeper.always and not self.context.settings.observe:
            keeper.say("it needs automatic optimization without LBFGS, one process, and step readback")
        return None

    def _mend(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        kept = self.last_good
        final = str(kept.path) if kept is not None and path == str(kept.pending) else path
        self.folder.saved(final, self.trainer.global_step)
        return self.guard.mend(checkpoint, path, checked=checked)

    def _keep_last_good(self, every: int) -> None:
        """From now on, write the last good checkpoint every ``every`` updates."""
        trainer, guard = self.trainer, self.guard
        folder, ring = self.folder.path, self.context.ring
        write = partial(write_checkpoint, trainer)
        kept = LastGood(folder, every, ring, write, leads=self.rank_zero, step=guard.updates)
        self._patches.callback(after_every_batch(trainer, lambda: kept.close_batch(guard.updates)))
        self._patches.callback(catch_write_errors(trainer.strategy, kept.pending, kept.failed))
        self.last_good = kept

    def _on_disk(self) -> str:
        """Lines that name what lies on disk: the last good checkpoint, and the command that tells the run."""
        kept = "" if self.last_good is None else self.last_good.message()
        folder = told_folder(self.folder.path)
        read = "" if folder is None else f"next: nanguard explain {shlex.quote(str(folder))}"
        return "\n".join(line for line in (kept, read) if line)

    def _limit_memory(self, max_memory: float | None) -> None:
        ring, ranks = self.context.ring, self.context.ranks
        if max_memory is None or ring.pending is None:
            return
        each = SnapshotSize.expected(self.context.learner).total(beside=True) / 2**30
        # Each rank holds the whole pending snapshot, and its share of the certified ones.
        fitting = int((max_memory / each - 1) * ranks.snapshot_parts) if each else ring.capacity
        fitting = min(ranks.gather(fitting))
        if fitting < 1:
            raise SettingsError(
                f"NaNGuard(max_snapshot_memory={max_memory!r}): one snapshot takes about {each:.3g} GiB and two are "
                f"needed, one certified and one pending. Allow {2 * each:.3g} GiB, or leave the limit out and set "
                'snapshot_device="cpu".'
            )
        ring.capacity = min(ring.capacity, fitting)

    def non_finite_rate(self) -> float:
        """Share of the updates, over all ranks, whose loss or gradient was not finite."""
        return self.guard.non_finite / max(1, self.guard.updates)  # all ranks have the same counts

    def has_other_optimizers(self) -> bool:
        """Whether the user's code has replaced optimizers since the guard was built."""
        now = self.trainer.optimizers
        return len(now) != len(self._optimizers) or any(map(is_not, now, self._optimizers))

    def optimizer_index(self, optimizer: Optimizer) -> int | None:
        """Index of an optimizer that is about to step; ``None`` if it will not, or is not known to the guard."""
        if step_only_accumulates(self.trainer) or not getattr(optimizer, "param_groups", True):
            return None
        for index, known in enumerate(self.context.learner.optimizers):
            if known is optimizer or getattr(optimizer, "optimizer", None) is known:
                return index
        if id(optimizer) not in self._unknown:
            self._unknown.add(id(optimizer))
            _logger.warning(
                "NaNGuard: the optimizer %s that is about to step was not there when the fit began; its updates are "
                "not guarded.",
                type(optimizer).__name__,
            )
        return None

    def _say_what_is_not_guarded(self) -> None:
        """At the start of training: log a message if there is nothing to guard, or not yet."""
        learner = self.context.learner
        name = type(learner.module).__name__
        if not learner.optimizers:
            _logger.info("NaNGuard: %s has no optimizer, so there are no updates to guard.", name)
        elif not any(p.requires_grad for index in range(len(learner.optimizers)) for p in learner.stepped(index)):
            _logger.info("NaNGuard: no parameter of %s is trained yet. The guard begins when one is.", name)
        elif self._skips_windows(learner.module):
            _logger.info(
                "NaNGuard: with %s one bad micro-batch makes the guard skip the whole update, with all its other "
                "micro-batches.",
                type(self.trainer.strategy).__name__,
            )

    def _skips_windows(self, module: Any) -> bool:
        """Whether there are windows of accumulation, but no single micro-batch can be left out."""
        steps, accumulates = self.guard.steps.check, self.trainer.accumulate_grad_batches > 1
        apart = self.context.many or self.context.ranks.sharded
        return accumulates and apart and module.automatic_optimization and not steps.together()

    def say_if_unseen(self) -> None:
        """At the end of training: log a message if batches were trained on and the guard saw no optimizer step."""
        if self.replay.batch_idx >= 0 and self.guard.updates == 0 and self.context.learner.optimizers:
            automatic = self.context.learner.module.automatic_optimization
            _logger.warning(
                "NaNGuard: batches were trained on, but no optimizer step was seen, so nothing was guarded. %s",
                "If you override optimizer_step, pass the closure to optimizer.step."
                if automatic
                else "Under manual optimization, step the optimizers that self.optimizers() returns.",
            )

    def say_how_it_went(self) -> None:
        """At the end: write the counts to the log of the run, and log the summary line on rank 0."""
        updates, multiplier = self.guard.updates, self.context.rate.ratio()
        before, faults, _ = self._memory.of_fit()
        counts = {"updates": updates, "updates_of_fit": updates - before, "faults": dict(faults)}
        self.folder.log("end", **counts, lr_multiplier=multiplier)
        if self.rank_zero:
            rank_zero_info(fit_summary(self._memory, self.context.settings, updates, multiplier, self.folder.path))

    def after_skip(self) -> None:
        """After a batch that was skipped: keep the names of its logged values, and do not hand its bad gradients on.

        A module with an ``optimizer_zero_grad`` of its own may add the gradients of the next batch to them.
        """
        self._names.after_skip()
        module = self.trainer.lightning_module
        if type(module).optimizer_zero_grad is package_of(type(module)).LightningModule.optimizer_zero_grad:
            return
        for parameter in module.parameters():
            if parameter.grad is not None and not all_finite(parameter.grad):
                parameter.grad = None

    def tell_of_failure(self, what: str) -> None:
        """Keep as advice that the guard has failed and leaves the run.

        Args:
            what: What failed, in words.
        """
        suggestion = f"{what}. From here on the run went on without the guard. Please report it with the traceback."
        self.diagnostics.advise("the guard failed", Finding("guard_failed", 1.0, {}, "guard", suggestion=suggestion))

    def restore_finite(self) -> None:
        """Restore the newest certified snapshot if the state is not finite, before the guard leaves the run."""
        good = self.context.ring.last_certified
        if good is not None and not self.context.settings.observe and self.context.corrupt()[0] is not None:
            restore(self.context.learner, good)

    def end_epoch(self) -> None:
        """Forget a batch that began and did not run, and give advice about the module's own GradScaler."""
        self._names.end_epoch()
        for finding in fallen_scales(self.context.learner.module):
            self.diagnostics.advise("loss scale", finding)
        if self.guard.end_epoch():
            self.replay.batch = None
            self.replay.batches.withdraw()

    def close(self) -> None:
        """Remove everything from the trainer, even if something fails in between."""
        with ExitStack() as last:
            last.callback(self.folder.close)
            if self.rank_zero and self.folder.keeps_files:
                last.callback(log_report, self.trainer, self.folder.path, self.folder.run_id)
            if self.context.curve is not None:
                last.callback(self.context.curve.write, last=True)
            last.callback(self._advice.close)
            last.callback(self.context.trials.close)
            last.callback(self.context.receipts.close)
            last.callback(self._sinks.close)
            last.callback(self._finder.close)
            last.push(self._patches)
            last.callback(self.guard.close)
            last.callback(self.diagnostics.close)
            if self.last_good is not None:
                last.callback(self.last_good.end)
