"""Rules for causes in the learner: its gradients and its updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_nanguard.decide.blame import made_worse
from lightning_nanguard.diagnosis.case import NO_FAULT, Case
from lightning_nanguard.diagnosis.rules.layers import exploding_initial_gradient
from lightning_nanguard.diagnosis.rules.signs import (
    PRODUCTS,
    blamed_unseen,
    gradient_not_finite,
    in_gradient,
    learner_diverged,
    worse_than_before,
)
from lightning_nanguard.diagnosis.rules.state import updates_enlarged_it
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, LearnerThresholds
from lightning_nanguard.thresholds.fixed import LARGEST_WITH_SQUARE
from lightning_nanguard.types import Evidence, Finding


def exploding_gradient(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A finite loss whose gradient is far too large, or overflows in a product."""
    fault, usual, clues, limits = case.fault, case.evidence.usual_norm, case.clues, thresholds.learner
    if fault is NO_FAULT:
        return exploding_initial_gradient(case, thresholds)
    if not in_gradient(fault):
        return None
    finite = [(name, norm) for name, norm in clues.norms if math.isfinite(norm)]
    origin = clues.origin
    if gradient_not_finite(fault):
        if origin is None or not origin.backward or origin.operation not in PRODUCTS:
            return None
        confidence, place = thresholds.confidence.gradient_product, origin.place
    else:
        # If the gradient is small when the batch is run again, the batch is not at fault.
        if clues.norm is not None and usual is not None and clues.norm < limits.spike_factor * usual:
            return None
        confidence = thresholds.confidence.gradient_large
        place = max(finite, key=lambda item: item[1], default=(fault.place, 0.0))[0]
    numbers = {"gradient_norm": fault.value if fault.value is not None else math.inf}
    history = "" if usual is None else f", usually {usual:.4g}"
    layers = ""
    if len(finite) > 1 and finite[-1][1] > 0:
        ratio = numbers["first_over_last_layer"] = finite[0][1] / finite[-1][1]
        layers = f"; that of {finite[0][0]} is {ratio:.3g} times that of {finite[-1][0]}"
    norm = numbers["gradient_norm"]
    clip = limits.clip_factor * usual if usual else 1.0
    if norm <= clip:
        return None  # nothing would be clipped
    # If the norm overflows, clipping by the norm sets every gradient to 0.
    kind, option = ("value", ', gradient_clip_algorithm="value"') if norm > LARGEST_WITH_SQUARE else ("norm", "")
    # The Trainer does not clip under manual optimization.
    by_hand = f'self.clip_gradients(optimizer, {clip:.2g}, "{kind}")'
    how = f"Trainer(gradient_clip_val={clip:.2g}{option})" if case.evidence.comparable else by_hand
    # Without a replay it is not known whether the backward pass made such a gradient.
    writes = "" if case.evidence.comparable else " Or look for code that writes to gradients (hooks)."
    large = f"{norm:.4g}" if math.isfinite(norm) else "not finite"
    return Finding(
        "exploding_gradient",
        confidence,
        evidence=numbers,
        place=place,
        suggestion=f"the gradient norm is {large}{history}{layers}. Clip gradients: {how}.{writes}",
    )


def learning_rate_too_high(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The updates increased the loss, because the rate is too high."""
    limits = thresholds.learner
    rate, allowed = _rate(case), _allowed(case, thresholds)
    confidence = _rate_confidence(case, thresholds)
    if confidence == 0.0 or _operation_explains_it(case, rate, allowed, limits) or _lowered_in_vain(case, limits):
        return None
    above = rate is not None and allowed is not None and rate > allowed
    if allowed is not None and not above and not _rate_is_shown(case, limits):
        return None  # the loss allows a higher rate than the one in use
    # With the comparison alone a single steep batch may be the reason.
    if above and confidence > thresholds.confidence.rate_worse:
        confidence = max(confidence, thresholds.confidence.rate_above_limit)
    numbers, parts = _rate_evidence(case, thresholds)
    found = "; ".join(parts) or "the loss diverged"
    text = f"{found}. {_how_to_lower(case, thresholds)}{_to(case, thresholds)}."
    return _learner_finding("learning_rate_too_high", confidence, case, numbers, text)


def _lowered_in_vain(case: Case, limits: LearnerThresholds) -> bool:
    """Whether the same fault came at a far higher rate before, and the weights have not grown at the present one."""
    now, rates = case.evidence.lr, [one.lr for one in case.earlier_here() if one.lr is not None]
    lowered = now is not None and max(rates, default=0.0) > limits.lowered_in_vain * now
    return lowered and case.evidence.multiplier < 1 and case.evidence.growth <= limits.grown_told


def _learner_finding(
    cause: str, confidence: float, case: Case, evidence: Mapping[str, float | str], suggestion: str
) -> Finding:
    """A finding that blames the learner for a fault."""
    return Finding(cause, confidence, evidence, case.fault.place, suggestion=suggestion, scope="learner")


def unstable_hyperparameter(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The learner diverged, and a hyperparameter other than the rate makes it diverge whatever the gradients are."""
    if not case.unstable or _rate_confidence(case, thresholds) == 0.0:
        return None
    confidence, evidence = thresholds.confidence.unstable, {"weights_grew": case.evidence.growth}
    return _learner_finding("unstable_hyperparameter", confidence, case, evidence, f"{case.unstable}.")


def _how_to_lower(case: Case, thresholds: DiagnosisThresholds) -> str:
    if _risen_from(case, thresholds) is not None:
        return "Look at the schedule, or whatever else raises it, or lower the peak"
    rate, now = _rate(case), case.evidence.lr
    peaked = rate is not None and now is not None and now < rate and not _lowered_by_guard(case, rate)
    return "Lower the peak of the learning rate" if peaked else "Use a warm-up of the learning rate, or lower it"


def _risen_from(case: Case, thresholds: DiagnosisThresholds) -> float | None:
    """The first rate of the run, if the highest one is clearly above it."""
    first, rate = case.evidence.first_lr, _rate(case)
    return first if first is not None and rate is not None and rate > thresholds.blame.rate_risen * first else None


def _rate_is_shown(case: Case, limits: LearnerThresholds) -> bool:
    """Whether the rate is clearly too high, even if the curvature under the good weights allows it.

    With momentum, or if the curvature is larger elsewhere, weights can diverge at such a rate.
    """
    trial = case.evidence.trial
    if trial is not None and trial.lacks:
        return True
    return case.fault.certain and case.evidence.growth > limits.ruined


def _rate_confidence(case: Case, thresholds: DiagnosisThresholds) -> float:
    """Confidence that the rate is to blame; 0 if it is not. A suspicion has to be confirmed first."""
    fault, evidence, limits, known = case.fault, case.evidence, thresholds.learner, thresholds.confidence
    if evidence.redone:
        return 0.0
    worse = worse_than_before(evidence, thresholds)
    signs = evidence.growth > limits.grown or evidence.climbing
    overflowed = evidence.redo_cause[0] == "forward_writes_buffer" and evidence.growth > limits.ruined
    if updates_enlarged_it(case, limits) or made_worse(evidence) or overflowed:
        return known.rate_diverged
    if fault.scope == "learner" and not fault.certain:
        if _lost_what_it_had(evidence) and not signs:
            return 0.0  # the run learned well at this rate
        return known.rate_trial if evidence.trial is not None or fault.proof == "none" or signs or worse else 0.0
    if learner_diverged(fault, evidence, thresholds):
        return known.rate_diverged
    if blamed_unseen(fault, evidence, thresholds):
        return known.rate_unseen
    blameless = evidence.corrupt is None and evidence.jump is None and case.clues.change is None
    return known.rate_worse if worse and blameless else 0.0


def _rate_evidence(case: Case, thresholds: DiagnosisThresholds) -> tuple[dict[str, float | str], list[str]]:
    """The evidence against the rate, in numbers and in words."""
    evidence, curvature, rate = case.evidence, case.curvature, _rate(case)
    limit = None if curvature is None else curvature.largest_rate
    numbers: dict[str, float | str] = {"weights_grew": evidence.growth}
    parts = []
    if rate is not None:
        numbers["lr"] = rate
        parts.append(f"{_course_of_rate(case, rate, thresholds)}{_in_other_groups(case)}")
    if curvature is not None and limit is not None and rate is not None and limit < rate:
        numbers |= {"slope": curvature.slope, "bend": curvature.bend, "largest_rate": limit}
    trial = evidence.trial
    if trial is not None and trial.lacks:
        numbers |= {"tried_rate_factor": trial.factor}
        restart = (
            "an earlier state, trained at the present rate,"
            if trial.factor == 1
            else f"a restart with {trial.factor:.3g} times the rate"
        )
        parts.append(f"{restart} has a lower loss after equally many updates")
    comparison = evidence.comparison
    if comparison is not None and worse_than_before(evidence, thresholds):
        numbers |= {"loss_now": comparison.now, "loss_before": comparison.then}
        parts.append(
            f"the loss of this batch is {comparison.now:.4g}, under the last good weights {comparison.then:.4g}"
        )
    if evidence.growth > thresholds.learner.grown_told:
        parts.append(f"a weight matrix grew to {evidence.growth:.2g} times its norm")
    return numbers, parts


def _operation_explains_it(case: Case, rate: float | None, limit: float | None, limits: LearnerThresholds) -> bool:
    """Whether an operation fails although the model is good, so that the rate is not to blame.

    A rate that is far too high ruins any model, and then its operations overflow, too.
    """
    fault, evidence, clues = case.fault, case.evidence, case.clues
    # If the loss is finite and its gradient is not, an operation is the cause, even without a replay.
    unseen = not clues.replayed and gradient_not_finite(fault)
    # Without a replay, an earlier finding at this place applies again.
    before = any(one.finding.scope == "batch" for one in case.earlier_here())
    operation = unseen or before if clues.origin is None else clues.origin.operation not in PRODUCTS
    signs = evidence.climbing or evidence.rate_rose
    # Weights that grew at a rate above the largest stable one were ruined by updates, even early in the run.
    fast = rate is not None and limit is not None and rate > limit and evidence.growth > limits.grown
    ruined = signs or fast or evidence.growth > limits.ruined or bool(evidence.jump)
    now = evidence.comparison.now if evidence.comparison is not None else math.nan
    # A loss that is not finite comes from the operation, and gives no evidence about the model.
    untrained = math.isfinite(now) and now > evidence.first + limits.untrained_units * evidence.loss_unit
    # Good runs stay near the largest stable rate. Far above it nothing is learned.
    above = rate is not None and limit is not None and rate > limits.rate_far_above * limit
    return operation and not (ruined or untrained or above)


def ill_conditioned(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The run diverges although the rate looks low: in one direction the loss is far steeper than in the others."""
    limits, rate, curvature = thresholds.learner, _rate(case), case.curvature
    if curvature is None or rate is None or curvature.steepest is None or curvature.typical is None:
        return None
    diverged = worse_than_before(case.evidence, thresholds) or learner_diverged(case.fault, case.evidence, thresholds)
    if not diverged or _operation_explains_it(case, rate, curvature.largest_rate, limits):
        return None
    low = rate <= thresholds.curvature.low_rate
    if not low or rate * curvature.steepest <= 2 or curvature.steepest < limits.uneven_curvature * curvature.typical:
        return None
    allowed = 2 / curvature.steepest
    numbers = {"lr": rate, "steepest": curvature.steepest, "typical": curvature.typical, "largest_rate": allowed}
    text = (
        f"the learning rate of {rate:.4g} looks low, but in its steepest direction the loss has a curvature of "
        f"{curvature.steepest:.3g}, which allows a rate of at most {allowed:.2g}; in other directions the curvature is "
        f"{curvature.typical:.2g}, and the weights hardly move. Normalise the inputs, add normalisation layers, use an "
        "adaptive optimizer (Adam), or lower the rate."
    )
    return _learner_finding("ill_conditioned", thresholds.confidence.ill_conditioned, case, numbers, text)


def collapsed(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The model had learned, and its loss is back at that of the untrained model."""
    fault, evidence, known = case.fault, case.evidence, thresholds.confidence
    back, lost = fault.kind == "collapsed", _lost_what_it_had(evidence)
    if not (back or lost):
        return None
    best = min((level for level in evidence.levels if level is not None), default=None)
    numbers: dict[str, float | str] = {"untrained": evidence.first}
    if (rate := _rate(case)) is not None:
        numbers["lr"] = rate
    had = ""
    if best is not None and best < evidence.first:
        numbers["best"] = best
        had = f"had come down to {best:.4g} and "
    # For other suspicions the value is older.
    now = fault.value if back and fault.value is not None and math.isfinite(fault.value) else None
    level = f"back at {now:.4g}" if now is not None else "clearly higher now" if had else "clearly higher than its best"
    cure = _cure_of_collapse(case, thresholds)
    text = f"the loss {had}is {level}; that of the untrained model was {evidence.first:.4g}. {cure}."
    return _learner_finding("collapsed", known.collapsed if lost else known.suspicion, case, numbers, text)


def _lost_what_it_had(evidence: Evidence) -> bool:
    """Whether a trial shows that the run had learned as much, at its own rate, as an arm with a lower rate."""
    trial = evidence.trial
    return trial is not None and trial.lacks > 0 and trial.base == "best" and not evidence.rate_rose


def _cure_of_collapse(case: Case, thresholds: DiagnosisThresholds) -> str:
    evidence = case.evidence
    rate, allowed = _rate(case), _allowed(case, thresholds)
    before = [one.lr for one in case.earlier if one.finding.cause == "collapsed" and one.lr is not None]
    if before and evidence.lr is not None and evidence.lr < before[-1]:
        return (
            f"It did so at a learning rate of {before[-1]:.2g}, and again at {evidence.lr:.2g}: look for what else "
            "changes the weights (an initialisation, weight decay, a callback), or the data"
        )
    if rate is not None and allowed is not None and allowed >= rate:
        return "Go back to a state from before the rise, and look for what changed the weights or the data"
    if _lost_what_it_had(evidence):
        return (
            "Go back to a state from before the rise, and look for what changed the weights or the data. If nothing "
            f"did, lower the learning rate{_to(case, thresholds)}"
        )
    return f"Go back to a state from before the rise and lower the learning rate{_to(case, thresholds)}"


def _rate(case: Case) -> float | None:
    """The highest rate since the good state, and now; ``None`` if none is known and valid."""
    known = (case.evidence.highest_lr, case.evidence.lr)
    return max((rate for rate in known if rate is not None and 0 < rate < math.inf), default=None)


def _course_of_rate(case: Case, rate: float, thresholds: DiagnosisThresholds) -> str:
    """The highest rate in words, with the first one of the run or the present one if these are others."""
    first, multiplier = _risen_from(case, thresholds), case.evidence.multiplier
    now = f"{rate if case.evidence.lr is None else case.evidence.lr:.4g}"
    differs = now != f"{rate:.4g}"
    cut = f" ({multiplier:.3g} times that of the schedule, by the guard)" if differs and multiplier < 1 else ""
    if first is not None:
        return f"the learning rate rose from {first:.4g} to {rate:.4g}" + (
            f", and is {now} now{cut}" if differs else ""
        )
    if differs and _lowered_by_guard(case, rate):
        return f"the learning rate is {now}, to which the guard has lowered it from {rate:.4g}"
    return f"the learning rate is {now}{cut}" + (f", and was {rate:.4g} before" if differs else "")


def _lowered_by_guard(case: Case, rate: float) -> bool:
    """Whether the guard alone, and no schedule, has lowered the rate from ``rate`` to the present one."""
    now, multiplier = case.evidence.lr, case.evidence.multiplier
    return now is not None and multiplier < 1 and math.isclose(now, rate * multiplier, rel_tol=1e-3)


def _in_other_groups(case: Case) -> str:
    """A note if another parameter group now has a higher rate than the first one."""
    now, highest = case.evidence.lr, case.evidence.group_lr
    higher = now is not None and highest is not None and highest > now
    return f", and up to {highest:.4g} in other parameter groups" if higher else ""


def _allowed(case: Case, thresholds: DiagnosisThresholds) -> float | None:
    """The largest stable rate, as it is now or as it was found shortly before."""
    if case.curvature is not None and case.curvature.largest_rate is not None:
        return case.curvature.largest_rate
    since = case.evidence.step - thresholds.blame.calm
    found = [one.finding.evidence.get("largest_rate") for one in case.earlier_here() if one.step >= since]
    known = [one for one in found if isinstance(one, float)]
    return known[-1] if known else None


def _to(case: Case, thresholds: DiagnosisThresholds) -> str:
    """For advice a guess at the rate to lower it to; empty for a fault that the guard acts on."""
    fault, rate, trial = case.fault, _rate(case), case.evidence.trial
    acts = fault.certain or fault.scope != "learner" or fault.proof == "none" or (trial is not None and trial.lacks > 0)
    if rate is None or acts or _risen_from(case, thresholds) is not None:
        # The message of an intervention adds the rate at which the run goes on, which is a better answer than a guess.
        # A schedule may have raised the rate so far that a guess is above what the user meant.
        return ""
    # The curvature along one step allows too much where noise, momentum or other directions make the run diverge.
    limit = None if case.curvature is None else case.curvature.largest_rate
    return f" to {min(rate, limit or rate) / thresholds.learner.suggested_cut:.2g} for a start"
