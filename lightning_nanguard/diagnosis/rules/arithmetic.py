"""Rules for causes in one operation: a number outside its domain, or a result that overflows."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard.diagnosis.case import Case, Origin
from lightning_nanguard.diagnosis.rules.domains import DOMAINS, largest_exponent, outside, squares_overflow
from lightning_nanguard.diagnosis.rules.phrases import (
    drawn_at,
    finding_at,
    of_samples,
    origin_evidence,
    smallest_operand,
)
from lightning_nanguard.diagnosis.rules.signs import PRODUCTS, number_format_exhausted
from lightning_nanguard.record.text import with_line
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

_LOGARITHMS = ("log", "log2", "log10", "log1p", "logit", "xlogy")
_EXPONENTIALS = ("exp", "exp2", "expm1", "sinh", "cosh")
_SOLVERS = "The matrix has no inverse, or almost none: add a multiple of the identity"
_DIVISIONS = ("div", "true_divide", "divide", "reciprocal", "remainder", "fmod", "addcdiv")
_SPREADS = ("std", "var", "std_mean", "var_mean")
_SOFTMAXES = ("softmax", "log_softmax", "safe_softmax", "logsumexp")
_ROOTS = ("sqrt", "pow", "rsqrt", "linalg_vector_norm", "norm", "cdist", "acos", "asin")


def log_of_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The logarithm of zero, or its derivative at zero."""
    origin = case.clues.origin
    if origin is None or origin.operation not in _LOGARITHMS:
        return None
    lowest, smallest = origin.lowest, origin.smallest
    # The logarithm of numbers well above zero is finite, so it is not the cause.
    if origin.operation not in ("log1p", "logit") and lowest is not None and lowest > thresholds.data.near_zero:
        return None
    given = "" if lowest is None and smallest is None else f"{origin.operation} was given {_extreme(origin)}. "
    if lowest is not None and lowest < 0 and origin.operation not in ("log1p", "logit"):
        remedy = "Keep its input above zero (softplus, clamp), or compute the loss from logits"
    else:
        remedy = "Add an epsilon inside the logarithm, or compute the loss from logits"
    return finding_at(
        "log_of_zero",
        thresholds.confidence.operation,
        origin,
        f"{given}{remedy} (cross_entropy, binary_cross_entropy_with_logits, log_softmax).",
    )


def _extreme(origin: Origin) -> str:
    """The number that lies outside the domain of a logarithm."""
    if origin.operation == "logit" and origin.highest is not None and origin.highest >= 1:
        return f"{origin.highest:.4g}"
    if origin.operation in ("log1p", "logit") and origin.lowest is not None:
        return f"{origin.lowest:.4g}"
    return smallest_operand(origin)


def exp_overflow(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """An exponential of a large number."""
    origin = case.clues.origin
    if origin is None or origin.operation not in _EXPONENTIALS:
        return None
    limit, largest = largest_exponent(origin), origin.highest
    if largest is not None and origin.operation in ("sinh", "cosh"):
        largest = max(largest, -(origin.lowest or 0.0))
    if origin.backward:
        # Autograd saves the result of an exponential, not its argument.
        made = "" if largest is None else f", whose result reaches {largest:.4g}"
        what = f"the derivative of {origin.operation}{made}, overflows in {origin.dtype}"
    elif largest is None:
        what = f"{origin.operation} overflows; {origin.dtype} holds it up to about {limit:.0f}"
    elif largest < limit:
        return None
    else:
        what = f"{origin.operation} was given {largest:.4g}, and the limit in {origin.dtype} is about {limit:.0f}"
    return finding_at(
        "exp_overflow",
        thresholds.confidence.operation,
        origin,
        f"{what}. Use logsumexp or softmax, which subtract the largest number first, or clamp its input.",
    )


def division_by_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A division by (almost) zero, a mean over nothing, the variance of one value, or a fully masked row."""
    origin = case.clues.origin
    text = None if origin is None else _division(origin, thresholds.data.near_zero)
    if origin is None or text is None:
        return None
    found = finding_at("division_by_zero", thresholds.confidence.operation, origin, text)
    # The number of the values is at fault, and no sample.
    return replace(found, samples=()) if origin.operation in _SPREADS and not origin.backward else found


def _division(origin: Origin, near_zero: float) -> str | None:
    smallest = origin.smallest
    tiny = smallest is not None and smallest < near_zero
    if origin.operation in _DIVISIONS and tiny:
        made = f" (the result of {origin.made_by})" if origin.made_by else ""
        return f"the denominator{made} is as small as {smallest:.4g}: {_remedy_of_division(origin)}."
    if (origin.operation == "rsqrt" or (origin.exponent or 0.0) < 0) and tiny and not origin.backward:
        remedy = _remedy_of_division(origin)
        return f"{origin.operation} was given {smallest:.4g}, whose inverse power is infinite: {remedy}."
    if origin.empty and not origin.backward and origin.operation not in (*_SPREADS, *_SOFTMAXES):
        of = "" if origin.operation == "mean" else f", in {origin.operation}"
        return f"a mean over no elements{of}: leave this term out of the loss if the mask selects nothing."
    if origin.operation in _SPREADS and origin.backward:
        return (
            f"the derivative of {origin.operation} is not finite where every value is the same: take the root of the "
            "variance plus an epsilon."
        )
    if origin.operation in _SPREADS and not squares_overflow(origin):
        return "the variance of a single value: use correction=0, or leave such batches out (drop_last=True)."
    if origin.operation in _SOFTMAXES and not origin.backward:
        return "a row in which every entry is masked: leave at least one entry unmasked."
    return None


def _remedy_of_division(origin: Origin) -> str:
    if origin.made_by in (*_SPREADS, "sqrt"):
        return "add an epsilon to the denominator, or leave out constant values"
    if origin.made_by in ("sum", "count_nonzero"):
        return "keep it at 1 or above (clamp_min), or leave this term out of the loss if nothing is counted"
    if not (origin.from_weights or origin.from_target) and origin.samples:
        return f"add an epsilon to the denominator, or look at the data{of_samples(origin.samples)}"
    return "add an epsilon to the denominator, or leave such samples out"


def sqrt_at_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A root at zero: the loss is finite, and the derivative of the root is infinite."""
    origin = case.clues.origin
    if origin is None or not origin.backward:
        return None
    steep = origin.exponent is not None and origin.exponent >= 1
    if origin.operation not in _ROOTS or steep or case.clues.gradient_finite is not False:
        return None
    if origin.operation in ("acos", "asin"):
        where, remedy = "-1 and 1", "Clamp its input to slightly less than that"
    elif origin.smallest is not None and origin.smallest > thresholds.data.near_zero:
        return None
    else:
        where, remedy = smallest_operand(origin), "Add an epsilon inside the root: sqrt(x + 1e-12)"
    return finding_at(
        "sqrt_at_zero",
        thresholds.confidence.sqrt_at_zero,
        origin,
        f"the loss is finite, but the derivative of {origin.operation} is not at {where}. {remedy}.",
    )


def low_precision_overflow(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A batch that is finite in float32 and not in 16 bits."""
    fault, clues, confidence = case.fault, case.clues, thresholds.confidence
    origin = clues.origin
    if clues.gradient_fits is not None:
        # A gradient too large for weights in float16. No sample is at fault for the number format.
        text = (
            "the loss is finite, and its gradient overflows in float16, whose largest number is 65,504. It fits in "
            "float32. Train with precision='bf16-mixed', or make the loss smaller (divide it, or normalise targets)."
        )
        found = _low_precision(case, confidence.low_precision_proven, "float16", text)
        return replace(found, samples=(), scope=None) if clues.gradient_fits else None
    if clues.finite_in_float32 is True:
        sure = confidence.low_precision_proven
    elif number_format_exhausted(fault) and clues.finite_in_float32 is None:
        sure = confidence.low_precision_loss_scale
    elif origin is not None and origin.dtype == "float16" and clues.finite_in_float32 is None:
        sure = confidence.low_precision_float16
    else:
        return None
    # The first non-finite number may be float32, computed from 16-bit numbers.
    dtype = origin.dtype if origin is not None and origin.dtype == "bfloat16" else "float16"
    proven = "the same batch is finite in float32, but not in" if clues.finite_in_float32 else "a number overflows in"
    if dtype == "bfloat16":
        text = f"{proven} bfloat16. Run this part under torch.autocast(enabled=False)."
    else:
        text = (
            f"{proven} float16, whose largest number is 65,504. Train with precision='bf16-mixed', or run this part "
            "under torch.autocast(enabled=False)."
        )
    return _low_precision(case, sure, dtype, text)


def _low_precision(case: Case, sure: float, dtype: str, text: str) -> Finding:
    origin, scope = case.clues.origin, case.fault.scope
    known = {"precision": dtype} | ({} if origin is None else origin_evidence(origin))
    place, samples = (case.fault.place, ()) if origin is None else (origin.place, origin.samples)
    return Finding("low_precision_overflow", sure, known, place, samples, text, "batch" if scope == "batch" else None)


def random_draw(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A fault that depends on the random numbers of the step, and not on the batch or the weights alone."""
    origin = case.clues.origin
    if not case.clues.gone_otherwise or case.evidence.climbing or case.evidence.rate_rose:
        return None
    where = "" if origin is None else f" It begins in {origin.place}."
    text = (
        "the fault depends on the random numbers of the step: with others, the same batch is finite under the same "
        f"weights.{where} Keep random numbers away from values for which the operation is not defined."
    )
    return drawn_at("random_draw", thresholds.confidence.random_draw, case, text)


def non_finite_from_start(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A buffer, such as class weights, that was not finite before the first update."""
    bad, origin = case.clues.bad_buffers, case.clues.origin
    # A buffer that was finite at the start is corrupted state.
    if case.evidence.corrupt is not None or case.clues.spoilt_buffers or case.evidence.undo:
        return None
    if not bad:
        return None if origin is None or case.clues.bad_fields else _given_bad(origin, thresholds)
    # Quantization observers start with Inf, and the step makes them finite.
    if origin is not None and not (origin.backward or origin.put_in or origin.given):
        return None
    names = ", ".join(bad[: thresholds.mistakes.named_parts])
    return Finding(
        "non_finite_from_start",
        thresholds.confidence.non_finite_from_start,
        evidence={"buffers": float(len(bad))},
        place=f"buffer {bad[0]}",
        suggestion=f"{names} held NaN or Inf before the first update, and the loss is not finite. Look at the "
        "code that computes it (a division by a count or a standard deviation of zero?), and start again.",
        scope="state",
    )


def _given_bad(origin: Origin, thresholds: DiagnosisThresholds) -> Finding | None:
    """A non-finite tensor of the user that is not a buffer."""
    if not origin.given:
        return None
    return finding_at(
        "non_finite_from_start",
        thresholds.confidence.non_finite_from_start,
        origin,
        f"{origin.given} of {origin.operation} held NaN or Inf, and no operation of this step made it. Look at the "
        "code that computes it (a division by a count or a standard deviation of zero?).",
    )


_ADVICE = {
    "ctc_loss": "It is infinite for a sample whose target is longer than its input allows: leave such samples out, or "
    "use zero_infinity=True",
    "linalg_eigh": "The derivative of eigenvectors is not finite where eigenvalues are equal: add a little noise",
    "linalg_svd": "Its derivative is not finite where singular values are equal or zero: add a little noise",
    "linalg_inv_ex": _SOLVERS,
    "linalg_solve_ex": _SOLVERS,
    "linalg_slogdet": _SOLVERS,
    "linalg_cholesky_ex": "The matrix is not positive definite: add a multiple of the identity",
    "atan2": "Its derivative is not finite where both are zero: add an epsilon",
}
_OVERFLOWS = PRODUCTS | {"add", "sum", "mean", "cumsum", "cumprod", "matmul", "mv", "dot", "std", "var"}


def unknown_operation(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The operation that computed the first non-finite value. It is named if no other rule fits."""
    origin = case.clues.origin
    if origin is None:
        return None
    given = ""
    beyond = outside(origin)
    if origin.lowest is not None and origin.highest is not None:
        # A number that is outside only by a rounding error is shown with all digits.
        digits = ".4g" if not beyond or DOMAINS[origin.operation].leaves(*_rounded(origin)) else ".8g"
        given = f", given numbers from {origin.lowest:{digits}} to {origin.highest:{digits}}"
    if beyond:
        given += f", where it needs numbers {DOMAINS[origin.operation].words}"
    where = f"{'the backward pass of ' if origin.backward else ''}{with_line(origin.operation, origin.line)}"
    if beyond:
        advice = "Clamp its input, or look at the code that computes the input"
    elif origin.put_in:
        advice = "Your code puts in NaN or Inf as a number, and nothing replaces it before the loss"
    elif origin.infinite:
        advice = "One of its inputs is infinite already: look at the code that computes that input"
    elif origin.operation in _OVERFLOWS:
        advice = f"The result is larger than {origin.dtype} can hold: keep the input smaller, or normalise it"
    else:
        advice = _ADVICE.get(origin.operation, "Look at its input there")
    return finding_at(
        "unknown_operation",
        thresholds.confidence.unknown_operation,
        origin,
        f"first non-finite value{of_samples(origin.samples)}: {where}{given}. {advice}.",
    )


def _rounded(origin: Origin) -> tuple[float, float]:
    """The range of an operation's input, rounded as in messages."""
    return float(f"{origin.lowest or 0.0:.4g}"), float(f"{origin.highest or 0.0:.4g}")
