"""Causes that lie in an operation: it was given what it is not defined for, or made what it cannot hold."""

from __future__ import annotations

from lightning_nanguard.diagnosis.case import Case, Origin
from lightning_nanguard.diagnosis.rules.phrases import finding_at, origin_evidence, smallest_operand
from lightning_nanguard.diagnosis.rules.signs import number_format_exhausted
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

_LOGARITHMS = ("log", "log2", "log10", "log1p", "logit", "xlogy")
_EXPONENTIALS = ("exp", "exp2", "expm1", "sinh", "cosh")
_DIVISIONS = ("div", "true_divide", "divide", "reciprocal", "remainder", "fmod", "addcdiv")
_SPREADS = ("std", "var", "std_mean", "var_mean")
_SOFTMAXES = ("softmax", "log_softmax", "safe_softmax")
_ROOTS = ("sqrt", "pow", "rsqrt", "linalg_vector_norm", "norm", "cdist", "acos", "asin")
# The largest number whose exponential each format holds.
_LARGEST_EXPONENT = {"float16": "11", "float64": "709"}


def log_of_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The logarithm of something that reached zero, or its derivative there."""
    origin = case.clues.origin
    if origin is None or origin.operation not in _LOGARITHMS:
        return None
    return finding_at(
        "log_of_zero",
        thresholds.confidence.operation,
        origin,
        f"{origin.operation} was given {smallest_operand(origin)}. Compute the loss from logits "
        "(cross_entropy, binary_cross_entropy_with_logits, log_softmax), or add an epsilon inside the logarithm.",
    )


def exp_overflow(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """An exponential of a large number."""
    origin = case.clues.origin
    if origin is None or origin.operation not in _EXPONENTIALS:
        return None
    largest = "a large number" if origin.highest is None else f"{max(origin.highest, -(origin.lowest or 0.0)):.4g}"
    limit = _LARGEST_EXPONENT.get(origin.dtype, "88")
    return finding_at(
        "exp_overflow",
        thresholds.confidence.operation,
        origin,
        f"{origin.operation} was given {largest}, {origin.dtype} ends at about {limit}. Use logsumexp or softmax, "
        "which subtract the largest number first, or clamp what goes in.",
    )


def division_by_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A division by zero or nearly so, a mean over nothing, the spread of one value, a row that is all masked."""
    origin = case.clues.origin
    text = None if origin is None else _division(origin, thresholds.data.near_zero)
    if origin is None or text is None:
        return None
    return finding_at("division_by_zero", thresholds.confidence.operation, origin, text)


def _division(origin: Origin, near_zero: float) -> str | None:
    remedy = "add an epsilon to the denominator, or leave out what is constant"
    smallest = origin.smallest
    tiny = smallest is not None and smallest < near_zero
    if origin.operation in _DIVISIONS and tiny:
        return f"the denominator is as small as {smallest:.4g}: {remedy}."
    if (origin.operation == "rsqrt" or (origin.exponent or 0.0) < 0) and tiny and not origin.backward:
        return f"{origin.operation} was given {smallest:.4g}, whose inverse power is infinite: {remedy}."
    if origin.operation == "mean" and origin.empty:
        return "a mean over nothing: leave the term out where the mask selects nothing."
    if origin.operation in _SPREADS:
        return "the spread of a single value: use correction=0, or leave such batches out (drop_last=True)."
    if origin.operation in _SOFTMAXES and not origin.backward:
        return "a row of which everything is masked: leave at least one entry open."
    if origin.operation.startswith(("nll_loss", "cross_entropy")):
        return "the mean over no target: every one is ignored (ignore_index); leave such batches out."
    return None


def sqrt_at_zero(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A root at zero: the loss is finite, and the derivative of the root is infinite."""
    origin = case.clues.origin
    if origin is None or not origin.backward:
        return None
    steep = origin.exponent is not None and origin.exponent >= 1
    if origin.operation not in _ROOTS or steep or case.clues.gradient_finite is not False:
        return None
    return finding_at(
        "sqrt_at_zero",
        thresholds.confidence.sqrt_at_zero,
        origin,
        f"the loss is finite, but the derivative of {origin.operation} is not at {smallest_operand(origin)}. Add an "
        "epsilon inside the root: sqrt(x + 1e-12).",
    )


def low_precision_overflow(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A batch that is finite in float32, and not in 16 bits."""
    fault, clues, confidence = case.fault, case.clues, thresholds.confidence
    origin = clues.origin
    if clues.finite_in_float32 is True:
        sure = confidence.low_precision_proven
    elif number_format_exhausted(fault) and clues.finite_in_float32 is None:
        sure = confidence.low_precision_loss_scale
    elif origin is not None and origin.dtype == "float16" and clues.finite_in_float32 is None:
        sure = confidence.low_precision_float16
    else:
        return None
    dtype = origin.dtype if origin is not None else "float16"
    return Finding(
        "low_precision_overflow",
        sure,
        evidence={"precision": dtype, **(origin_evidence(origin) if origin is not None else {})},
        place=origin.place if origin is not None else fault.place,
        samples=origin.samples if origin is not None else (),
        suggestion=(
            f"the same batch is finite in float32 and overflows in {dtype}, which ends at 65,504. Train with "
            "precision='bf16-mixed', or run this part under torch.autocast(enabled=False)."
        ),
    )
