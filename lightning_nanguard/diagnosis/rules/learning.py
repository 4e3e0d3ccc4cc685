"""Causes that lie in the learner: its state, its gradients, its updates."""

from __future__ import annotations

import math

from lightning_nanguard.decide.blame import learner_did_it
from lightning_nanguard.diagnosis.clues import NO_FAULT, Case
from lightning_nanguard.diagnosis.rules.model import exploding_at_the_start
from lightning_nanguard.diagnosis.rules.words import PRODUCTS, learner_diverged, worse
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.types import Finding

# How many times as steep as usual the steepest direction is where the loss counts as ill-conditioned.
_UNEVEN = 100.0

# A rate this many times as high as the loss allows is to blame for whatever comes after.
_FAR_ABOVE = 4.0


def corrupted_state(case: Case) -> Finding | None:
    """Weights, buffers or moments went bad though no batch was: the fault is gone on good state."""
    fault, evidence, change = case.fault, case.evidence, case.clues.change
    if evidence.undo or evidence.climbing or evidence.rate_rose:
        return None
    if fault.kind == "implausible_state":
        # Running statistics also jump where a batch far out of range passes a normalisation.
        return _corrupted(0.7, fault.place, "became far larger than it was")
    if evidence.corrupt is not None:
        return None if fault.scope == "learner" else _corrupted(0.97, evidence.corrupt, "is no longer finite")
    if change is not None and case.clues.good_finite is not False and not _bad_there_too(case):
        moved = (
            f"went from {change.before:.4g} to {change.now:.4g}, where its elements moved by {change.usual:.2g} at most"
        )
        return _corrupted(0.95, change.name, moved, before=change.before, now=change.now, usual=change.usual)
    if evidence.jump is None or fault.scope == "learner" or learner_did_it(evidence, BlameThresholds()):
        return None
    return _corrupted(0.9, evidence.jump, "grew ten thousandfold within a few updates")


def _bad_there_too(case: Case) -> bool:
    loss, usual = case.clues.good_loss, case.evidence.loss_unit
    return loss is not None and loss > case.evidence.first + 10 * usual


def _corrupted(confidence: float, name: str, what: str, **numbers: float) -> Finding:
    return Finding(
        "corrupted_state",
        confidence,
        evidence={"tensor": name, **numbers},
        place=name,
        suggestion=(
            f"{name} {what}, though losses and gradients were healthy until now: a fault of memory or of code that "
            "writes into it. If it comes back, test the device."
        ),
    )


def exploding_gradient(case: Case) -> Finding | None:
    """A finite loss whose gradient is far too large, or overflows in a product."""
    fault, evidence, clues = case.fault, case.evidence, case.clues
    if fault is NO_FAULT:
        return exploding_at_the_start(case)
    if fault.kind not in ("gradient_spike", "gradient_overflow", "non_finite_gradient"):
        return None
    finite = [(name, norm) for name, norm in clues.norms if math.isfinite(norm)]
    origin = clues.origin
    if fault.kind == "non_finite_gradient":
        if origin is None or not origin.backward or origin.operation not in PRODUCTS:
            return None
        confidence, place = 0.75, origin.place
    else:
        # A gradient that is small when the batch is run again was none of the batch's.
        usual = evidence.usual_norm
        if clues.norm is not None and usual is not None and clues.norm < 10 * usual:
            return None
        confidence = 0.7
        place = max(finite, key=lambda item: item[1], default=(fault.place, 0.0))[0]
    numbers = {"gradient_norm": fault.value if fault.value is not None else math.inf}
    history = "" if evidence.usual_norm is None else f", usually {evidence.usual_norm:.4g}"
    layers = ""
    if len(finite) > 1 and finite[-1][1] > 0:
        ratio = numbers["first_over_last_layer"] = finite[0][1] / finite[-1][1]
        layers = f"; that of {finite[0][0]} is {ratio:.3g} times that of {finite[-1][0]}"
    clip = 1.0 if evidence.usual_norm is None else 2 * evidence.usual_norm
    return Finding(
        "exploding_gradient",
        confidence,
        evidence=numbers,
        place=place,
        suggestion=(
            f"the gradient norm is {numbers['gradient_norm']:.4g}{history}{layers}. Clip gradients: "
            f"Trainer(gradient_clip_val={clip:.2g})."
        ),
    )


def learning_rate_too_high(case: Case) -> Finding | None:
    """The updates themselves made the loss worse."""
    fault, evidence, curvature = case.fault, case.evidence, case.curvature
    rate, limit = _rate(case), None if curvature is None else curvature.largest_rate
    above = rate is not None and limit is not None and rate > limit
    if fault.kind == "exploding_loss":
        confidence = 0.9 if worse(evidence) else 0.7 if evidence.growth > 4 or evidence.climbing else 0.0
    elif fault.kind == "collapsed":
        confidence = 0.7 if worse(evidence) or evidence.growth > 4 or evidence.climbing else 0.0
    elif fault.kind in ("stuck_loss", "overshoot"):
        confidence = 0.8
    elif learner_diverged(fault, evidence):
        confidence = 0.9
    else:
        blameless = evidence.corrupt is None and evidence.jump is None and case.clues.change is None
        confidence = 0.6 if worse(evidence) and blameless else 0.0
    if confidence == 0.0 or _operation_explains_it(case, rate, limit):
        return None
    if above and confidence >= 0.7 and fault.kind != "collapsed":
        confidence = max(confidence, 0.91)  # a single steep batch is above it, too
    numbers: dict[str, float | str] = {"weights_grew": evidence.growth}
    parts = []
    if rate is not None:
        numbers["lr"] = rate
        parts.append(f"learning rate {rate:.4g}")
    if curvature is not None and limit is not None:
        numbers |= {"slope": curvature.slope, "bend": curvature.bend, "largest_rate": limit}
        parts.append(f"along {curvature.along} the loss of this batch stops falling above {limit:.2g}")
    comparison = evidence.comparison
    if comparison is not None and worse(evidence):
        numbers |= {"loss_now": comparison.now, "loss_before": comparison.then}
        parts.append(
            f"the loss of this batch is {comparison.now:.4g}, under the last good weights {comparison.then:.4g}"
        )
    if evidence.growth > 2:
        parts.append(f"a weight matrix grew to {evidence.growth:.3g} times its norm")
    return Finding(
        "learning_rate_too_high",
        confidence,
        evidence=numbers,
        place=fault.place,
        suggestion=f"{'; '.join(parts) or 'the loss diverged'}. Lower the learning rate{_to(case)}, or warm it up.",
    )


def _operation_explains_it(case: Case, rate: float | None, limit: float | None) -> bool:
    """Whether a good model was given to an operation that does not hold it, and not a ruined one.

    A rate that is far too high lays waste to any model, and in the end its exponential overflows, too.
    """
    fault, evidence, clues = case.fault, case.evidence, case.clues
    # A finite loss that cannot be differentiated is an operation's doing, also where it was not looked for again.
    unseen = not clues.replayed and fault.kind == "non_finite_gradient"
    operation = unseen if clues.origin is None else clues.origin.operation not in PRODUCTS
    ruined = (
        evidence.climbing
        or evidence.rate_rose
        or evidence.excursion
        or evidence.growth > BlameThresholds().grown
        or bool(evidence.jump)
    )
    now = evidence.comparison.now if evidence.comparison is not None else math.nan
    # One that is not finite is the operation's own, and says nothing of the model.
    untrained = math.isfinite(now) and now > evidence.first + 0.1 * evidence.loss_unit
    # Good runs stay about the largest rate; far above it nothing is learned.
    above = rate is not None and limit is not None and rate > _FAR_ABOVE * limit
    return operation and not (ruined or untrained or above)


def ill_conditioned(case: Case) -> Finding | None:
    """Diverging though the rate looks low: one direction is far steeper than the others, which hardly move."""
    rate, curvature = _rate(case), case.curvature
    if curvature is None or rate is None or curvature.steepest is None or curvature.typical is None:
        return None
    diverged = worse(case.evidence) or learner_diverged(case.fault, case.evidence)
    if not diverged or _operation_explains_it(case, rate, curvature.largest_rate):
        return None
    if rate * curvature.steepest < 2 or curvature.steepest < _UNEVEN * curvature.typical:
        return None
    return Finding(
        "ill_conditioned",
        0.915,
        evidence={
            "lr": rate,
            "steepest": curvature.steepest,
            "typical": curvature.typical,
            "largest_rate": 2 / curvature.steepest,
        },
        place=case.fault.place,
        suggestion=(
            f"learning rate {rate:.4g} looks low, but the loss bends by {curvature.steepest:.3g} in its steepest "
            f"direction, which allows {2 / curvature.steepest:.2g} at most, and by {curvature.typical:.2g} in others, "
            "which hardly move. Normalise the inputs, add normalisation layers, use an adaptive optimizer "
            "(Adam), or lower the rate."
        ),
    )


def collapsed(case: Case) -> Finding | None:
    """Having learned, the loss is back at the untrained model's."""
    fault, evidence = case.fault, case.evidence
    if fault.kind != "collapsed":
        return None
    best = min((level for level in evidence.levels if level is not None), default=None)
    numbers: dict[str, float | str] = {"untrained": evidence.first}
    was = ""
    if best is not None:
        numbers["best"] = best
        was = f", where it had come down to {best:.4g}"
    return Finding(
        "collapsed",
        0.8,
        evidence=numbers,
        place=fault.place,
        suggestion=(
            f"the loss is back at {fault.value if fault.value is not None else evidence.first:.4g}, about the "
            f"untrained model's {evidence.first:.4g}{was}. Go back to before it and lower the learning rate{_to(case)}."
        ),
    )


def _rate(case: Case) -> float | None:
    return case.evidence.highest_lr if case.evidence.highest_lr is not None else case.evidence.lr


def _to(case: Case) -> str:
    rate, limit = _rate(case), None if case.curvature is None else case.curvature.largest_rate
    if rate is not None and limit is not None and limit < rate:
        return f" below {limit:.2g}; {limit / 2:.2g} lowers this batch's loss most"
    return "" if rate is None else f", to {rate / 10:.2g} for a start"
