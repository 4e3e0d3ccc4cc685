"""From a fault, its evidence and the clues to a finding: one pure function for each cause, no torch.

A rule looks at numbers and says ``Finding`` or nothing; the surest one wins. To add a cause, write its function and
enter it in :data:`RULES`. The identifiers of the causes are part of the records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_nanguard.diagnosis.clues import Clues, Origin, Range
from lightning_nanguard.events import Fault, Finding
from lightning_nanguard.policy import Evidence

Rule = Callable[[Fault, Evidence, Clues], Finding | None]


def diagnose(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """The surest finding, ``None`` where no rule has one; of equally sure ones that of the earlier rule.

    Example:
        >>> diagnose(Fault("non_finite_loss", "batch", "loss"), Evidence(step=3, batch_finite=False), Clues()).cause
        'non_finite_input'
    """
    found = [finding for rule in RULES if (finding := rule(fault, evidence, clues)) is not None]
    return max(found, key=lambda finding: finding.confidence, default=None)


# ------------------------------------------------------------------------------------------------ the data


def non_finite_input(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """NaN or Inf in the batch."""
    if not clues.bad_fields and evidence.batch_finite is not False:
        return None
    # Some models take NaN for what is missing: then something else made the loss bad.
    harmless = clues.origin is not None or (clues.loss is not None and math.isfinite(clues.loss))
    confidence = 0.4 if harmless else 0.98
    if not clues.bad_fields:
        return Finding("non_finite_input", confidence, suggestion="The batch holds NaN or Inf: clean the data.")
    first = clues.bad_fields[0]
    columns = f", {_listed('column', first.columns)}" if first.columns else ""
    more = f", and {len(clues.bad_fields) - 1} more fields of it" if len(clues.bad_fields) > 1 else ""
    who = _listed("sample", first.samples) or "the batch"
    verb = "holds" if len(first.samples) == 1 or not first.samples else "hold"
    return Finding(
        "non_finite_input",
        confidence,
        evidence={"field": first.field, "bad_samples": float(len(first.samples))},
        place=f"field {first.field} of the batch",
        samples=first.samples,
        suggestion=f"{who} of this batch {verb} NaN or Inf in field {first.field}{columns}{more}. Clean the data.",
    )


# Below which numbers an operation is not defined.
_DOMAINS = {
    "log": "above 0",
    "log2": "above 0",
    "log10": "above 0",
    "log1p": "above -1",
    "sqrt": "of at least 0",
    "rsqrt": "above 0",
    "pow": "of at least 0",
    "xlogy": "of at least 0",
    "logit": "between 0 and 1",
    "lgamma": "above 0",
    "acos": "between -1 and 1",
    "asin": "between -1 and 1",
    "atanh": "between -1 and 1",
}


def target_out_of_domain(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """A target that the loss is not defined for, or far outside the others."""
    origin, target = clues.origin, clues.target
    if origin is not None and origin.from_target and not origin.from_weights and _leaves_domain(origin):
        return _at(
            "target_out_of_domain",
            0.95,
            origin,
            f"{_span(target, origin)}, {origin.operation} needs numbers {_DOMAINS[origin.operation]}. Fix the targets"
            f"{_of(origin.samples)}.",
        )
    if target is None or not target.outliers or not _sudden(fault):
        return None
    return _outliers("target_out_of_domain", target, "Fix the targets, or clip them.")


def _leaves_domain(origin: Origin) -> bool:
    if origin.operation == "pow":
        # A power of large numbers overflows, which is another matter.
        return origin.lowest is not None and origin.lowest < 0 and not (origin.exponent or 0.0).is_integer()
    return origin.operation in _DOMAINS


def unnormalised_input(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """Inputs far from zero mean and unit variance."""
    inputs = clues.inputs
    if inputs is None:
        return None
    if inputs.outliers and _sudden(fault):
        return _outliers("unnormalised_input", inputs, "Clean the data, or clip the inputs.")
    if clues.normalises or inputs.magnitude < _UNNORMALISED:
        return None
    diverged = _learner_diverged(fault, evidence)
    if not diverged and evidence.healthy_steps >= 20 and "gradient" not in fault.place:
        return None  # it went well with such inputs
    return Finding(
        "unnormalised_input",
        0.92 if diverged else 0.5,
        evidence=_numbers(inputs),
        place=f"field {inputs.field} of the batch",
        suggestion=(
            f"the input runs from {inputs.lowest:.4g} to {inputs.highest:.4g} with mean {inputs.mean:.4g} and standard "
            f"deviation {inputs.std:.4g}. Subtract the mean and divide by the standard deviation, or begin with a "
            "normalisation layer."
        ),
    )


# ------------------------------------------------------------------------------------------------ operations


def log_of_zero(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """The logarithm of something that reached zero, or its derivative there."""
    origin = clues.origin
    if origin is None or origin.operation not in ("log", "log2", "log10", "log1p", "logit", "xlogy"):
        return None
    return _at(
        "log_of_zero",
        0.85,
        origin,
        f"{origin.operation} was given {_least(origin)}. Compute the loss from logits "
        "(cross_entropy, binary_cross_entropy_with_logits, log_softmax), or add an epsilon inside the logarithm.",
    )


def exp_overflow(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """An exponential of a large number."""
    origin = clues.origin
    if origin is None or origin.operation not in ("exp", "exp2", "expm1", "sinh", "cosh"):
        return None
    largest = "a large number" if origin.highest is None else f"{max(origin.highest, -(origin.lowest or 0.0)):.4g}"
    limit = "11" if origin.dtype == "float16" else "709" if origin.dtype == "float64" else "88"
    return _at(
        "exp_overflow",
        0.85,
        origin,
        f"{origin.operation} was given {largest}, {origin.dtype} ends at about {limit}. Use logsumexp or softmax, "
        "which subtract the largest number first, or clamp what goes in.",
    )


def division_by_zero(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """A division by zero or nearly so, a mean over nothing, the spread of one value, a row that is all masked."""
    origin = clues.origin
    if origin is None:
        return None
    words = "add an epsilon to the denominator, or leave out what is constant"
    smallest = origin.smallest
    tiny = smallest is not None and smallest < 1e-3
    if origin.operation in ("div", "true_divide", "divide", "reciprocal", "remainder", "fmod", "addcdiv") and tiny:
        text = f"the denominator is as small as {smallest:.4g}: {words}."
    elif (origin.operation == "rsqrt" or (origin.exponent or 0.0) < 0) and tiny and not origin.backward:
        text = f"{origin.operation} was given {smallest:.4g}, whose inverse power is infinite: {words}."
    elif origin.operation == "mean" and origin.empty:
        text = "a mean over nothing: leave the term out where the mask selects nothing."
    elif origin.operation in ("std", "var", "std_mean", "var_mean"):
        text = "the spread of a single value: use correction=0, or leave such batches out (drop_last=True)."
    elif origin.operation in ("softmax", "log_softmax", "safe_softmax") and not origin.backward:
        text = "a row of which everything is masked: leave at least one entry open."
    elif origin.operation.startswith(("nll_loss", "cross_entropy")):
        text = "the mean over no target: every one is ignored (ignore_index); leave such batches out."
    else:
        return None
    return _at("division_by_zero", 0.85, origin, text)


def sqrt_at_zero(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """A finite root, of which the derivative is not: that of the root at zero is infinite."""
    origin = clues.origin
    if origin is None or not origin.backward:
        return None
    roots = ("sqrt", "pow", "rsqrt", "linalg_vector_norm", "norm", "cdist", "acos", "asin")
    steep = origin.exponent is not None and origin.exponent >= 1
    if origin.operation not in roots or steep or clues.gradient_finite is not False:
        return None
    return _at(
        "sqrt_at_zero",
        0.9,
        origin,
        f"the loss is finite, but the derivative of {origin.operation} is not at {_least(origin)}. Add an epsilon "
        "inside the root: sqrt(x + 1e-12).",
    )


def low_precision_overflow(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """Finite in float32, not in 16 bits."""
    origin = clues.origin
    if clues.finite_in_float32 is True:
        confidence = 0.95
    elif fault.kind == "loss_scale_collapse" and clues.finite_in_float32 is None:
        confidence = 0.6
    elif origin is not None and origin.dtype == "float16" and clues.finite_in_float32 is None:
        confidence = 0.7
    else:
        return None
    dtype = origin.dtype if origin is not None else "float16"
    return Finding(
        "low_precision_overflow",
        confidence,
        evidence={"precision": dtype, **(_origin_evidence(origin) if origin is not None else {})},
        place=origin.place if origin is not None else fault.place,
        samples=origin.samples if origin is not None else (),
        suggestion=(
            f"the same batch is finite in float32 and overflows in {dtype}, which ends at 65,504. Train with "
            "precision='bf16-mixed', or run this part under torch.autocast(enabled=False)."
        ),
    )


# ------------------------------------------------------------------------------------------------ the learner


def corrupted_state(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """Weights, buffers or moments went bad though no batch was."""
    if evidence.undo or evidence.climbing or evidence.rate_rose:
        return None
    if evidence.corrupt is None and _learner_did_it(evidence):
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


def exploding_gradient(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """A finite loss whose gradient is far too large, or overflows in a product."""
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


def learning_rate_too_high(fault: Fault, evidence: Evidence, clues: Clues) -> Finding | None:
    """The updates themselves made the loss worse."""
    comparison = evidence.comparison
    worse = comparison is not None and comparison.worse(0.1 * evidence.scale)
    if fault.kind in ("exploding_loss", "collapsed"):
        confidence = 0.9 if worse else 0.7 if evidence.growth > 4 or evidence.climbing else 0.0
    elif fault.kind == "stuck_loss":
        confidence = 0.8
    elif _learner_diverged(fault, evidence):
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


RULES: tuple[Rule, ...] = (
    non_finite_input,
    target_out_of_domain,
    unnormalised_input,
    log_of_zero,
    exp_overflow,
    division_by_zero,
    sqrt_at_zero,
    low_precision_overflow,
    corrupted_state,
    exploding_gradient,
    learning_rate_too_high,
)
"""Every rule, in the order that settles a tie."""


# ------------------------------------------------------------------------------------------------ words and numbers

# Root mean square of an input from which on it counts as not normalised; pixels of 0…255 have about 150.
_UNNORMALISED = 10.0
# Healthy updates after a rollback before the learner is trusted again.
_CALM = 200
# What multiplies gradients on their way back.
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mul", "convolution", "linear", "square", "pow", "prod"})


def _sudden(fault: Fault) -> bool:
    return fault.scope == "batch"


def _learner_diverged(fault: Fault, evidence: Evidence) -> bool:
    if fault.scope == "learner" and fault.kind != "loss_scale_collapse":
        return True
    if evidence.corrupt is not None:
        return evidence.climbing or evidence.rate_rose
    comparison = evidence.comparison
    worse = comparison is not None and comparison.worse(0.1 * evidence.scale)
    return worse and (_learner_did_it(evidence) or (evidence.growth > 4 and evidence.jump is None))


def _learner_did_it(evidence: Evidence) -> bool:
    # As the policy sees it: what comes out of nothing in a calm run was not the learner's doing.
    soon = evidence.healthy_since_restore is not None and evidence.healthy_since_restore < _CALM
    return evidence.climbing or evidence.rate_rose or soon or evidence.healthy_steps < 20


def _at(cause: str, confidence: float, origin: Origin, suggestion: str) -> Finding:
    return Finding(cause, confidence, _origin_evidence(origin), origin.place, origin.samples, suggestion)


def _origin_evidence(origin: Origin) -> dict[str, float | str]:
    numbers = {"lowest": origin.lowest, "highest": origin.highest}
    words: dict[str, float | str] = {
        "operation": origin.operation,
        "module": origin.module or "training_step",
        "pass": "backward" if origin.backward else "forward",
    }
    if origin.line:
        words["line"] = origin.line
    return words | {name: value for name, value in numbers.items() if value is not None}


def _numbers(found: Range) -> dict[str, float | str]:
    return {"lowest": found.lowest, "highest": found.highest, "mean": found.mean, "std": found.std}


def _outliers(cause: str, found: Range, cure: str) -> Finding:
    largest = max(abs(found.lowest), abs(found.highest))
    return Finding(
        cause,
        0.8,
        evidence=_numbers(found),
        place=f"field {found.field} of the batch",
        samples=found.outliers,
        suggestion=(
            f"field {found.field} reaches {largest:.4g} in {_listed('sample', found.outliers)} of this batch, where "
            f"a sample usually stays within {found.usual:.4g}. {cure}"
        ),
    )


def _span(target: Range | None, origin: Origin) -> str:
    if target is not None:
        return f"targets run from {target.lowest:.4g} to {target.highest:.4g}"
    return f"what the target gives runs from {origin.lowest} to {origin.highest}"


def _least(origin: Origin) -> str:
    if origin.lowest is not None and origin.lowest < 0:
        return f"{origin.lowest:.4g}"
    return "zero" if not origin.smallest else f"{origin.smallest:.4g}"


def _of(samples: Sequence[int]) -> str:
    return f" of {_listed('sample', samples)}" if samples else ""


def _listed(noun: str, numbers: Sequence[int], at_most: int = 8) -> str:
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    shown = [str(number) for number in numbers[:at_most]]
    if len(numbers) > at_most:
        return f"{noun}s {', '.join(shown)} and {len(numbers) - at_most:,} more"
    return f"{noun}s {', '.join(shown[:-1])} and {shown[-1]}"
