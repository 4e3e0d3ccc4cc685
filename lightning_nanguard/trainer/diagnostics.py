"""Runs the diagnosis in a fit, and gives advice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

from lightning_nanguard.diagnosis.bundle import Bundle, BundleStore, name_of_class
from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.diagnosis.diagnostician import Diagnostician
from lightning_nanguard.diagnosis.examination import Examination
from lightning_nanguard.diagnosis.isolation import errors_logged
from lightning_nanguard.diagnosis.mistakes import mistakes
from lightning_nanguard.diagnosis.module_state import state_of
from lightning_nanguard.diagnosis.preflight import Preflight
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.errors import require
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.record.fit_log import FitLog
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.first_updates import FirstUpdates
from lightning_nanguard.trainer.private.data_order import readable_loader
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.strategies import autocasts_to_half, grad_scaler
from lightning_nanguard.trainer.run_advice import EndedSchedule, SkipShare
from lightning_nanguard.trainer.sample_finder import SampleFinder
from lightning_nanguard.types import Advice, Evidence, Fault, Finding, Intervention

_FIRST_UPDATES = "first updates"


@final
class Diagnostics:
    """Finds causes of faults, checks the first batch, and examines a loss that does not fall. It changes nothing.

    Args:
        trainer: The trainer.
        module: Its module.
        context: The objects that the parts of the guard share.
        replay: Runs batches again.
        arguments: The arguments of the guard.
        advice: Keeps advice.
        finder: Names the bad samples of a batch.

    Attributes:
        first_updates: Observes the first updates; ``None`` after them, and if nothing can be observed.
        preflight_due: Whether the preflight is still due.
        asked: Whether the user asked for an examination.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        context: GuardContext,
        replay: TrainerBatchReplay,
        arguments: Arguments,
        *,
        advice: FitLog[Advice],
        finder: SampleFinder,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._context = context
        self._replay = replay
        self._ranks = context.ranks
        self._advice = advice
        records = context.thresholds.records
        self._most_advice = records.advice_per_fit
        require(self._most_advice >= 1, records, "advice_per_fit", self._most_advice, "at least 1")
        thresholds = replace(context.thresholds.diagnosis, blame=context.thresholds.decision.blame)
        self._thresholds = thresholds
        # Writes incidents to disk; ``None`` writes none.
        self._bundles: BundleStore | None = None
        if arguments.bundle_dir is not None and trainer.is_global_zero:
            self._bundles = BundleStore(Path(os.path.abspath(arguments.bundle_dir)), thresholds.bundles)
        self._finder = finder
        self._skips = SkipShare(context.thresholds.samples)
        self._rules = RuleSet(arguments.rules, thresholds)
        self._diagnostician = Diagnostician(
            context.learner,
            context.ring,
            replay.rerun,
            replay.untraced,
            loss_scale=self._loss_scale,
            low_precision=autocasts_to_half(trainer),
            rules=self._rules,
            thresholds=thresholds,
        )
        self._examination = Examination(
            context.learner,
            replay.rerun,
            replay.untraced,
            arguments.examine_after,
            rules=self._rules,
            thresholds=thresholds,
        )
        self._examines = arguments.examine_after is not None
        self.first_updates = None if self._ranks.sharded else FirstUpdates(trainer, module, context)
        self._ended: EndedSchedule | None = None
        self.preflight_due = arguments.preflight and trainer.global_step == 0
        self.asked = False

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Find the cause of a fault, and write the incident to disk if the user asked for it."""
        if look == "replay" and (not self._replay.comparable() or self._ranks.sharded):
            look = "batch"
        good = self._context.ring.good_for(evidence) if look == "replay" else None
        if good is not None:
            good = self._ranks.join_snapshot(good)  # all ranks must take part, so not in a branch
        batches = self._replay.batches
        micros = batches.of(update)
        if self._replay.suspect is not None:
            micros = [micro for micro in micros if micro.index == self._replay.suspect] or micros
        finding = self._diagnostician.diagnose(fault, evidence, micros, look, good, batches.healthy_before())
        finding = self._explained(finding)
        # If a bad update was made, the batches after it were not checked.
        later = batches.since(update) if evidence.undo and look != "nothing" else []
        searched = [] if look == "nothing" else [*micros, *later]
        about, run = self._diagnostician.looked_at, look == "replay"
        finding = self._finder.find(fault, evidence, finding, searched, about, good, run=run)
        whole = micros and look != "nothing" and not self._ranks.sharded
        if whole and self._bundles is not None and self._bundles.due(fault, finding):
            self._bundles.keep(self._incident(fault, evidence, finding, micros, good), self._trainer.global_step)
        return finding

    def _explained(self, finding: Finding | None) -> Finding | None:
        """A mistake that the first updates showed, if it explains why the learner diverged; else the finding."""
        if finding is None or finding.scope != "learner":
            return finding
        shown = (one.finding for one in self._advice.given if one.occasion == _FIRST_UPDATES)
        return next((one for one in shown if one.scope == "learner"), finding)

    def _incident(
        self,
        fault: Fault,
        evidence: Evidence,
        finding: Finding | None,
        micros: Sequence[MicroBatch],
        good: Snapshot | None,
    ) -> Bundle:
        state = state_of(self._module)
        good = good or self._context.ring.last_certified
        if evidence.undo and good is not None and not good.shared():
            # The update was already made: use the last good snapshot, which is close to the state before it.
            state |= {path[-1]: leaf for path, leaf in good.leaves.items() if path[0] in ("parameter", "buffer")}
        return Bundle(
            module=name_of_class(type(self._module)),
            hparams=dict(self._module.hparams),
            fault=fault,
            evidence=evidence,
            finding=finding,
            batches=micros,
            state=state,
            precision=str(self._trainer.precision),
            loss_scale=self._loss_scale(),
        )

    def end_batch(self) -> None:
        """A batch is over: examine the loss and judge the first updates if that is due."""
        self._examine_if_due()
        if self.first_updates is not None and self.first_updates.end_batch():
            self.judge_first_updates()
        if self._ended is not None:
            self._judge_schedule(self._ended)

    def close(self) -> None:
        """The fit is over."""
        if self.first_updates is not None:
            self.first_updates.close()

    def judge_first_updates(self) -> None:
        """Give advice about mistakes that the first updates showed, and stop observing."""
        first, self.first_updates = self.first_updates, None
        if first is None:
            return
        found: Sequence[Finding] = ()
        with errors_logged("the first updates could not be judged"):
            first.close()
            seen = first.observation()
            found = () if seen is None else mistakes(seen, self._thresholds)
            if seen is not None:
                step, optimizers = self._context.state.step, self._context.learner.optimizers
                self._ended = EndedSchedule(seen, optimizers, step, self._thresholds)
        for finding in found:
            self.advise(_FIRST_UPDATES, finding)

    def _judge_schedule(self, ended: EndedSchedule) -> None:
        """Give advice once a schedule that seemed to have ended has raised no rate for long enough."""
        finding = ended.finding(self._context.state.step)
        if finding is not None:
            self.advise(_FIRST_UPDATES, finding)
        if not ended.waits:
            self._ended = None

    def preflight(self, batch: Any) -> None:
        """Check the first batch and the untrained model, and give advice."""
        self.preflight_due = False
        preflight = Preflight(
            self._module,
            partial(self._replay.step.loss_with_graph, batch_idx=self._replay.batch_idx),
            self._replay.untraced,
            rules=self._rules,
            thresholds=self._thresholds,
        )
        run = self._replay.comparable() and self._is_whole() and batch is not None
        for finding in preflight.findings(batch, readable_loader(self._trainer, self._module), run=run):
            if finding.confidence > self._thresholds.confidence.told:
                self.advise("preflight", finding)

    def _examine_if_due(self) -> None:
        """Examine a loss that does not move, or the present run if the user asked for it."""
        if not (self._examines or self.asked):
            return
        history, asked = self._context.monitors.history(0), self.asked
        course = self._examination.due(self._context.state.step, history, asked=asked)
        if course is None:
            return
        self.asked = False
        if not self._replay.comparable() or not self._is_whole():
            return
        rates = self._context.rate.effective()
        evidence = Evidence(
            step=self._context.state.step,
            first=course.first,
            loss_unit=history.loss_unit(),
            lr=rates[0] if rates else None,
        )
        micros = self._replay.batches.since(-1)
        for finding in self._examination.findings(micros, course, evidence, asked=asked):
            if finding.confidence > self._thresholds.confidence.told:
                self.advise("asked" if asked else "loss does not move", finding)

    def note(self, intervention: Intervention) -> None:
        """Take note of an intervention, and give advice if bad samples cost many updates."""
        advice = self._skips.note(intervention, self._context.state.step) if self._context.samples else None
        if advice is not None:
            self.advise("skipped batches", advice)

    def advise(self, occasion: str, finding: Finding, step: int | None = None) -> None:
        """Give advice, once for each cause and place, and once more if the user asks. Its number is bounded.

        Args:
            occasion: When the guard gives it.
            finding: The finding.
            step: Its ``global_step``; ``None`` for the present one.
        """
        given, asked = self._advice.given, occasion == "asked"
        about = {(one.finding.cause, one.finding.place) for one in given if not asked or one.occasion == occasion}
        if (finding.cause, finding.place) in about or len(given) >= self._most_advice:
            return
        at = self._trainer.global_step if step is None else step
        self._advice.give(Advice(at, self._trainer.current_epoch, occasion, finding))

    def _is_whole(self) -> bool:
        return self._trainer.world_size == 1 and not self._ranks.sharded

    def _loss_scale(self) -> float | None:
        scaler = grad_scaler(self._trainer)
        return None if scaler is None else float(scaler.get_scale())
