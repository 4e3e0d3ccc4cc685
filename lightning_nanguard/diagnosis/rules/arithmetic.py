"""Causes that lie in an operation: what it was given, it is not defined for or cannot hold."""

from __future__ import annotations

from lightning_nanguard.diagnosis.clues import Case
from lightning_nanguard.diagnosis.rules.words import at, least, origin_evidence
from lightning_nanguard.types import Finding


def log_of_zero(case: Case) -> Finding | None:
    """The logarithm of something that reached zero, or its derivative there."""
    clues = case.clues
    origin = clues.origin
    if origin is None or origin.operation not in ("log", "log2", "log10", "log1p", "logit", "xlogy"):
        return None
    return at(
        "log_of_zero",
        0.85,
        origin,
        f"{origin.operation} was given {least(origin)}. Compute the loss from logits "
        "(cross_entropy, binary_cross_entropy_with_logits, log_softmax), or add an epsilon inside the logarithm.",
    )


def exp_overflow(case: Case) -> Finding | None:
    """An exponential of a large number."""
    clues = case.clues
    origin = clues.origin
    if origin is None or origin.operation not in ("exp", "exp2", "expm1", "sinh", "cosh"):
        return None
    largest = "a large number" if origin.highest is None else f"{max(origin.highest, -(origin.lowest or 0.0)):.4g}"
    limit = "11" if origin.dtype == "float16" else "709" if origin.dtype == "float64" else "88"
    return at(
        "exp_overflow",
        0.85,
        origin,
        f"{origin.operation} was given {largest}, {origin.dtype} ends at about {limit}. Use logsumexp or softmax, "
        "which subtract the largest number first, or clamp what goes in.",
    )


def division_by_zero(case: Case) -> Finding | None:
    """A division by zero or nearly so, a mean over nothing, the spread of one value, a row that is all masked."""
    clues = case.clues
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
    return at("division_by_zero", 0.85, origin, text)


def sqrt_at_zero(case: Case) -> Finding | None:
    """A finite root, of which the derivative is not: that of the root at zero is infinite."""
    clues = case.clues
    origin = clues.origin
    if origin is None or not origin.backward:
        return None
    roots = ("sqrt", "pow", "rsqrt", "linalg_vector_norm", "norm", "cdist", "acos", "asin")
    steep = origin.exponent is not None and origin.exponent >= 1
    if origin.operation not in roots or steep or clues.gradient_finite is not False:
        return None
    return at(
        "sqrt_at_zero",
        0.9,
        origin,
        f"the loss is finite, but the derivative of {origin.operation} is not at {least(origin)}. Add an epsilon "
        "inside the root: sqrt(x + 1e-12).",
    )


def low_precision_overflow(case: Case) -> Finding | None:
    """Finite in float32, not in 16 bits."""
    fault, clues = case.fault, case.clues
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
        evidence={"precision": dtype, **(origin_evidence(origin) if origin is not None else {})},
        place=origin.place if origin is not None else fault.place,
        samples=origin.samples if origin is not None else (),
        suggestion=(
            f"the same batch is finite in float32 and overflows in {dtype}, which ends at 65,504. Train with "
            "precision='bf16-mixed', or run this part under torch.autocast(enabled=False)."
        ),
    )
