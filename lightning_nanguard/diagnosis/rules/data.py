"""Causes that lie in the data."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.clues import Case, Origin
from lightning_nanguard.diagnosis.rules.model import early_harm, large_inputs, outside_the_classes
from lightning_nanguard.diagnosis.rules.words import (
    PRODUCTS,
    at,
    learner_diverged,
    listed,
    numbers_of,
    of,
    outliers,
    span,
    sudden,
)
from lightning_nanguard.types import Finding


def non_finite_input(case: Case) -> Finding | None:
    """NaN or Inf in the batch."""
    evidence, clues = case.evidence, case.clues
    if not clues.bad_fields and evidence.batch_finite is not False:
        return None
    # Some models take NaN for what is missing: then something else made the loss bad.
    harmless = clues.origin is not None or (clues.loss is not None and math.isfinite(clues.loss))
    # A bounded activation makes a finite loss of it, and its product with a gradient of 0 is NaN.
    if clues.origin is not None and clues.origin.backward and clues.origin.operation in PRODUCTS:
        harmless = False
    confidence = 0.4 if harmless else 0.98
    if not clues.bad_fields:
        return Finding("non_finite_input", confidence, suggestion="The batch holds NaN or Inf: clean the data.")
    first = clues.bad_fields[0]
    columns = f", {listed('column', first.columns)}" if first.columns else ""
    more = f", and {len(clues.bad_fields) - 1} more fields of it" if len(clues.bad_fields) > 1 else ""
    who = listed("sample", first.samples) or "the batch"
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


def target_out_of_domain(case: Case) -> Finding | None:
    """A target that the loss is not defined for, or far outside the others."""
    fault, clues = case.fault, case.clues
    origin, target = clues.origin, clues.target
    if origin is not None and origin.from_target and not origin.from_weights and _leaves_domain(origin):
        return at(
            "target_out_of_domain",
            0.95,
            origin,
            f"{span(target, origin)}, {origin.operation} needs numbers {_DOMAINS[origin.operation]}. Fix the targets"
            f"{of(origin.samples)}.",
        )
    if target is None or not target.outliers or not sudden(fault):
        return outside_the_classes(case)
    return outliers("target_out_of_domain", target, "Fix the targets, or clip them.")


def _leaves_domain(origin: Origin) -> bool:
    if origin.operation == "pow":
        # A power of large numbers overflows, which is another matter.
        return origin.lowest is not None and origin.lowest < 0 and not (origin.exponent or 0.0).is_integer()
    return origin.operation in _DOMAINS


def unnormalised_input(case: Case) -> Finding | None:
    """Inputs far from zero mean and unit variance."""
    fault, evidence, clues = case.fault, case.evidence, case.clues
    inputs = clues.inputs
    if inputs is None:
        return None
    if inputs.outliers and sudden(fault):
        return outliers("unnormalised_input", inputs, "Clean the data, or clip the inputs.")
    if not large_inputs(case):
        return None
    early = early_harm(case.model)
    diverged = bool(early) or learner_diverged(fault, evidence)
    if not diverged and evidence.healthy_steps >= 20 and "gradient" not in fault.place:
        return None  # it went well with such inputs
    return Finding(
        "unnormalised_input",
        0.94 if diverged else 0.5,
        evidence=numbers_of(inputs),
        place=f"field {inputs.field} of the batch",
        suggestion=(
            f"{early}the input runs from {inputs.lowest:.4g} to {inputs.highest:.4g} with mean {inputs.mean:.4g} and "
            f"standard deviation {inputs.std:.4g}. Subtract the mean and divide by the standard deviation, or begin "
            "with a normalisation layer."
        ),
    )
