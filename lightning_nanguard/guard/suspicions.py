"""Tells the user of readings that are unusual but did no harm, so that nothing is done about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import final

from lightning_nanguard.distributed.ranks import most_confident_over_ranks
from lightning_nanguard.guard.beside import Beside
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.guard.loop import Clock, TrainingLoop
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.types import Evidence, Fault, Finding, Reading, Trial

_REMEDIES = "Lower the learning rate, clip gradients, or look at that batch"


@final
@dataclass(eq=False)
class Suspicions:
    """Tells the user of suspicions that the guard does not act on, and remembers the newest one.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Finds causes, gives advice to the user, and gives the trainer's step, epoch and batch.
        investigator: Measures the growth of the weights.
        beside: Knows whether a trial runs, and why none can be made.
        recorder: Knows the causes that were found so far.
    """

    context: GuardContext
    loop: TrainingLoop
    investigator: Investigator
    beside: Beside
    recorder: InterventionRecorder

    def advise(self, fault: Fault, reading: Reading, *, late: bool) -> None:
        """Give advice about a suspicion that the guard does not act on. Pause the detectors unless it is doubtful.

        Args:
            fault: The suspicion.
            reading: Its reading.
            late: Whether the update was made before its reading was judged. Otherwise it is about to be made.
        """
        if not fault.doubtful:
            self.context.monitors.dismiss(reading)
        self.tell(fault, reading, self._clock(reading, late=late))

    def leave(self, fault: Fault, reading: Reading, clock: Clock, trial: Trial | None) -> None:
        """Give advice about a suspicion that was investigated and is left alone, unless a trial answers it.

        Args:
            fault: The suspicion.
            reading: Its reading.
            clock: Its ``global_step``, epoch and batch.
            trial: The trial that has just tested it; ``None`` without one.
        """
        tried = trial is not None
        # A confirmed trial is followed by another one.
        follows = self.beside.trials.running or (trial is not None and trial.lacks > 0)
        if not (fault.certain or (tried if fault.doubtful else follows)):
            self.tell(fault, reading, clock, tried=tried)

    def at_end(self) -> None:
        """Give advice about suspicions of the newest readings, because the fit ends before the next check is due."""
        context = self.context
        if context.many:
            return  # with uneven data some ranks may not come here
        for index, fault in context.monitors.at_end():
            if not (fault.certain or fault.doubtful):
                self.tell(
                    fault, Reading(context.state.step, index, None, None), self.recorder.clock(unmade=False), ended=True
                )

    def tell(self, fault: Fault, reading: Reading, clock: Clock, *, tried: bool = False, ended: bool = False) -> None:
        """Give advice about a suspicion, and remember it.

        A doubtful one is told only if the loss is above the first one of the run and the weights show the cause. If the
        loss does not show which weights are better, a suspicion of the learner is told only if the weights show it.

        Args:
            fault: The suspicion.
            reading: Its reading.
            clock: Its ``global_step``, epoch and batch.
            tried: Whether a trial has just found no lower rate that is better.
            ended: Whether the fit ends.
        """
        if fault.doubtful and not self._above_first(fault, reading.optimizer_index) > 0:
            return
        found = self._shown_by_weights(fault) or self._moved_outside(fault)
        if found is None and (fault.doubtful or (fault.scope == "learner" and self.investigator.loss_shows_nothing())):
            return
        self.remember(fault, clock, "finite, so nothing was done", _REMEDIES)
        if found is not None:
            suggestion = f"{fault.message}; {found.suggestion} {self._unchanged(fault, tried=tried, ended=ended)}"
            self.loop.advise(replace(found, suggestion=suggestion), clock)
            return
        evidence = {} if fault.value is None else {"value": fault.value}
        if fault.scope == "learner" and not self._is_above_noise(fault, reading.optimizer_index):
            return
        confidence = self.context.thresholds.diagnosis.confidence.suspicion
        remedy = "Look for what changed the weights or the data" if tried else self._lower_rate()
        suggestion = f"{fault.message}. {remedy}. {self._unchanged(fault, tried=tried, ended=ended)}"
        several = len(self.context.learner.optimizers) > 1
        place = f"the {fault.place} of optimizer {reading.optimizer_index}" if several else fault.place
        self.loop.advise(Finding(fault.kind, confidence, evidence, place, suggestion=suggestion), clock)

    def _clock(self, reading: Reading, *, late: bool) -> Clock:
        return self.recorder.clock(reading.step if late else None)

    def remember(self, fault: Fault, clock: Clock, why: str, advice: str) -> None:
        """Remember a fault whose update was made, because it may explain a state that becomes bad later.

        Args:
            fault: The fault.
            clock: Its ``global_step``, epoch and batch.
            why: Why its update was made.
            advice: What the user may do.
        """
        words = f"an earlier fault may be the reason (step {clock[0]}: {fault.message}; {why}). {advice}"
        self.context.state.told = self.context.state.step, words

    def tell_of_bad_losses(self, reading: Reading, *, late: bool) -> None:
        """Tell the user once that losses are not finite while gradients are."""
        infinite = reading.loss is not None and math.isinf(reading.loss)
        what, remedy = (
            ("infinite", "Look for the term that is infinite. If it overflows, compute it in a wider number format.")
            if infinite
            else ("NaN", "Look for the term that is NaN and has no gradient: a detached or a masked one.")
        )
        known = self.recorder.best_finding(Fault("non_finite_loss", "batch", "loss"))
        if known is not None and known.place:
            remedy = f"They come from {known.place}: {known.suggestion}"
        _, times = self.context.state.bad_alone
        suggestion = (
            f"the loss of {times} updates in a row is not finite (the last is {what}), and their gradients are finite. "
            f"{self._from_now_on('because they do not harm the weights')} {remedy}"
        )
        confidence = self.context.thresholds.diagnosis.confidence.suspicion
        cause = "infinite_loss" if infinite else "nan_loss"
        finding = Finding(cause, confidence, {}, "loss", suggestion=suggestion)
        self.loop.advise(finding, self._clock(reading, late=late))

    def tell_of_large_gradients(self, fault: Fault, reading: Reading, *, late: bool) -> None:
        """Tell the user once that every gradient so far was finite and too large."""
        state, confidence = self.context.state, self.context.thresholds.diagnosis.confidence.suspicion
        suggestion = (
            f"{fault.message}. The same is true of all {state.step} updates so far. "
            f"{self._from_now_on('because otherwise no update would ever be made')} "
            f"{_how_to_scale_down(reading.grad_norm)}"
        )
        clock = self._clock(reading, late=late)
        self.remember(fault, clock, "as in all updates, so it was made", "Scale the loss down")
        evidence = {} if fault.value is None else {"value": fault.value}
        finding = Finding(fault.kind, confidence, evidence, fault.place, suggestion=suggestion)
        self.loop.advise(finding, clock)

    def _lower_rate(self) -> str:
        first, now = self.context.state.first_rate, self.context.rate.first()
        if first is not None and now is not None and now > self.context.thresholds.decision.blame.rate_risen * first:
            return f"The learning rate has risen from {first:.3g} to {now:.3g}: look at its schedule, or lower its peak"
        return "If the run diverges, start it again with a lower learning rate"

    def _unchanged(self, fault: Fault, *, tried: bool, ended: bool) -> str:
        nothing, evidence = "Nothing was changed: every number is finite", self.context.settings.act_on == "evidence"
        if tried:
            return f"{nothing}, and a trial found no lower learning rate at which the model learns more."
        if ended and evidence:
            return f"{nothing}, and the fit ended before a trial could show more."
        if self.beside.trials.running:
            return f"{nothing}, and a trial of lower learning rates is running."
        hindrance = self.beside.trials.hindrance(run=evidence)  # with act_on="certain" no batch is run
        if fault.doubtful and not hindrance and evidence:
            return f"{nothing}, and no trial is due yet."
        if hindrance or evidence:
            return f"{nothing}, and no trial can be made{f', because {hindrance}' if hindrance else ''}."
        return f'{nothing}. NaNGuard(act_on="evidence") would look for further evidence and act on it.'

    def _from_now_on(self, why: str) -> str:
        return "" if self.context.settings.observe else f"From now on the guard makes such updates, {why}."

    def _is_above_noise(self, fault: Fault, optimizer_index: int) -> bool:
        """Whether the loss is above the first loss of the run by more than the middle half of the newest losses spans.

        Where hardly anything can be learned, the newest losses are above the first one in half of all runs. A run that
        had learned far more than they span has lost it.
        """
        history, above = self.context.monitors.history(optimizer_index), self._above_first(fault, optimizer_index)
        if above <= 0:
            return True
        newest = history.losses(self.context.thresholds.detection.diverging_loss.readings)
        if len(newest) < 2:
            return True
        lower, _, upper = quantiles(newest)
        return max(above, history.learned() / self.context.thresholds.detection.diverging_loss.learned) > upper - lower

    def _above_first(self, fault: Fault, optimizer_index: int) -> float:
        """How far the loss of a fault is above the first loss of the run; 0 if one of them is not known."""
        first = self.context.monitors.history(optimizer_index).first
        return 0.0 if fault.value is None or first is None else fault.value - first

    def _shown_by_weights(self, fault: Fault) -> Finding | None:
        """The cause of a suspicion of the learner, if the growth of its weights shows one. No batch is run."""
        if fault.scope != "learner":
            return None
        context, growth = self.context, self.investigator.growth()
        if growth <= context.thresholds.diagnosis.learner.ruined:
            return None
        rates, unit = context.rate.effective(), context.monitors.loss_unit()
        evidence = Evidence(
            context.state.step,
            growth=growth,
            loss_unit=unit,
            lr=next(iter(rates), None),
            highest_lr=context.state.highest_rate(context.state.last_rollback + 1) or None,
            first_lr=context.state.first_rate,
            group_lr=max(rates, default=None),
        )
        mine = self.loop.diagnose(fault, evidence, "nothing", context.state.step)
        found = most_confident_over_ranks(context.ranks, mine)
        told = context.thresholds.diagnosis.confidence.told
        return found if found is not None and found.confidence > told else None

    def _moved_outside(self, fault: Fault) -> Finding | None:
        """The cause of a suspicion of the learner, if code outside of the optimizer's step moves the weights."""
        moved, known = self.beside.control.outside, self.context.thresholds.diagnosis.confidence
        if fault.scope != "learner" or moved is None or not moved.parameters:
            return None
        suggestion = (
            f"in each update code outside of the optimizer's step moves the weights {moved.ratio:.3g} times as far as "
            f"the step does, most of all {' and '.join(moved.parameters[:2])}. Look in hooks and callbacks for what "
            "writes to the weights: an initialisation, a decay, a copy from another model."
        )
        # A projection onto weights that were allowed before moves them no farther than the step did.
        confidence = known.collapsed if moved.ratio > 1 else known.suspicion
        numbers: dict[str, float | str] = {"ratio": moved.ratio}
        return Finding("weights_moved_outside", confidence, numbers, moved.parameters[0], suggestion=suggestion)


def _how_to_scale_down(norm: float | None) -> str:
    what = "Bring inputs, targets and the first weights to a size near 1"
    if not norm or not math.isfinite(norm):
        return f"{what}."
    small = 10.0 ** -math.ceil(math.log10(norm))
    return (
        f"{what}, or multiply the loss by {small:.0e}. The learning rate of Adam, and of other optimizers that divide "
        "by the size of the gradients, stays as it is. Divide that of SGD by the same number."
    )
