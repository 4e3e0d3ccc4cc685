"""Causes that lie in the learner: its state, its gradients, its updates."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.clues import NO_FAULT, Case
from lightning_nanguard.diagnosis.rules.model import exploding_at_the_start
from lightning_nanguard.diagnosis.rules.words import learner_did_it, learner_diverged
from lightning_nanguard.events import Finding

# What multiplies gradients on their way back.
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mul", "convolution", "linear", "square", "pow", "prod"})


def corrupted_state(case: Case) -> Finding | None:
    """Weights, buffers or moments went bad though no batch was."""
    fault, evidence = case.fault, case.evidence
    if evidence.undo or evidence.climbing or evidence.rate_rose:
        return None
    if evidence.corrupt is None and learner_did_it(evidence):
        return None
    name = evidence.corrupt if evidence.corrupt is not None else evidence.jump
    if name is None or fault.scope == "learner":
        return None
    what = "is not finite" if evidence.corrupt is not None else "grew ten thousandfold within a few updates"
    return Finding(
        "corrupted_state",
        0.97 if evidence.corrupt is not None else 0.9,
        evidence={"tensor": name, "healthy_steps": float(evidence.healthy_steps)},
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
        if origin is None or not origin.backward or origin.operation not in _PRODUCTS:
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
    fault, evidence = case.fault, case.evidence
    comparison = evidence.comparison
    worse = comparison is not None and comparison.worse(0.1 * evidence.scale)
    if fault.kind in ("exploding_loss", "collapsed"):
        confidence = 0.9 if worse else 0.7 if evidence.growth > 4 or evidence.climbing else 0.0
    elif fault.kind == "stuck_loss":
        confidence = 0.8
    elif learner_diverged(fault, evidence):
        confidence = 0.9
    else:
        confidence = 0.6 if worse and evidence.corrupt is None and evidence.jump is None else 0.0
    if confidence == 0.0:
        return None
    rate = evidence.highest_lr if evidence.highest_lr is not None else evidence.lr
    numbers = {"weights_grew": evidence.growth}
    parts = []
    if rate is not None:
        numbers["lr"] = rate
        parts.append(f"learning rate {rate:.4g}")
    if comparison is not None and worse:
        numbers |= {"loss_now": comparison.now, "loss_before": comparison.then}
        parts.append(
            f"the loss of this batch is {comparison.now:.4g}, under the last good weights {comparison.then:.4g}"
        )
    if evidence.growth > 2:
        parts.append(f"a weight matrix grew to {evidence.growth:.3g} times its norm")
    least = "" if rate is None else f", to {rate / 10:.2g} for a start"
    why = "; ".join(parts) or "the loss diverged"
    return Finding(
        "learning_rate_too_high",
        confidence,
        evidence=numbers,
        place=fault.place,
        suggestion=f"{why}. Lower the learning rate{least}, or warm it up.",
    )
