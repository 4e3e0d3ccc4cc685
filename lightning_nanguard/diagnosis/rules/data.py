"""Rules for causes in the data."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.case import Case, Range
from lightning_nanguard.diagnosis.rules.domains import DOMAINS, outside
from lightning_nanguard.diagnosis.rules.layers import harm_of_large_inputs
from lightning_nanguard.diagnosis.rules.loss_function import class_out_of_range
from lightning_nanguard.diagnosis.rules.phrases import (
    drawn_at,
    finding_at,
    listed,
    of_samples,
    outlier_finding,
    range_evidence,
    target_span,
)
from lightning_nanguard.diagnosis.rules.signs import PRODUCTS, inputs_are_large, learner_diverged
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

_DIVISIONS = ("div", "true_divide", "divide")
_COUNTS = ("sum", "mean", "count_nonzero")
_CLASS_LOSSES = ("nll_loss", "cross_entropy")


def non_finite_input(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """NaN or Inf in the batch."""
    clues = case.clues
    if not clues.bad_fields and case.evidence.batch_finite is not False:
        return None
    # Some models use NaN for missing values. Then something else made the loss bad.
    tolerated = clues.origin is not None or (clues.loss is not None and math.isfinite(clues.loss))
    # A product makes NaN of the Inf that it was given: in forward with numbers of both signs, or in backward with a
    # gradient of 0, if a bounded activation gives a finite loss for Inf.
    if clues.origin is not None and clues.origin.operation in PRODUCTS:
        given = clues.origin.infinite and not clues.origin.put_in
        tolerated = not (clues.origin.backward or given)
    known = thresholds.confidence
    confidence = known.non_finite_input_tolerated if tolerated else known.non_finite_input
    # If the loss masks missing values with torch.where, its gradient can still be NaN.
    forward = clues.loss is not None and math.isfinite(clues.loss) and clues.gradient_finite is False
    if not clues.bad_fields:
        text = "The batch holds NaN or Inf: clean the data."
        return Finding("non_finite_input", confidence, suggestion=text, scope="batch")
    first = clues.bad_fields[0]
    columns = f", {listed('column', first.columns)}" if first.columns else ""
    more = f", and in {len(clues.bad_fields) - 1} more fields" if len(clues.bad_fields) > 1 else ""
    who = f"{listed('sample', first.samples)} of this batch" if first.samples else "this batch"
    verb = "hold" if len(first.samples) > 1 else "holds"
    return Finding(
        "non_finite_input",
        confidence,
        evidence={"field": first.field, "bad_samples": float(len(first.samples))},
        place=f"field {first.field} of the batch",
        samples=first.samples,
        suggestion=f"{who} {verb} NaN or Inf in field {first.field}{columns}{more}. "
        + (
            "The loss leaves it out, but the gradient does not: 0 times NaN is NaN. Replace it before it is used "
            "(nan_to_num), and not later with torch.where."
            if forward
            else "Clean the data."
        ),
        scope="batch",
    )


def target_out_of_domain(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A target that the loss is not defined for, or far outside the others."""
    origin, target = case.clues.origin, case.clues.target
    if origin is not None and origin.from_target and not origin.from_weights and outside(origin):
        return finding_at(
            "target_out_of_domain",
            thresholds.confidence.target_operation,
            origin,
            f"{target_span(target, origin)}, {origin.operation} needs numbers {DOMAINS[origin.operation].words}. "
            f"Fix the targets{of_samples(origin.samples)}.",
        )
    remedy = "Correct or clip these numbers. They may be targets, or weights of the samples."
    far = _unlike_others("target_out_of_domain", case, target, remedy, thresholds)
    return class_out_of_range(case, thresholds) if far is None else far


def _unlike_others(
    cause: str, case: Case, found: Range | None, remedy: str, thresholds: DiagnosisThresholds
) -> Finding | None:
    """A finding about numbers of a faulty batch that are far larger than in its other samples or the batches before."""
    confidence = thresholds.confidence.outliers
    if found is None or case.fault.scope != "batch":
        return None
    far = found.outliers or found.largest > thresholds.data.other_units * found.before > 0
    return outlier_finding(cause, confidence, found, remedy) if far else None


def no_valid_target(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A mean over zero targets: every label is ignored, or a mask selects nothing. The mask may be drawn at random."""
    origin, target, loss = case.clues.origin, case.clues.target, case.clues.loss
    if origin is None or origin.backward or (loss is not None and math.isinf(loss)):
        return None  # a mean over nothing is NaN; an infinite loss has overflowed
    drawn = bool(case.clues.gone_otherwise)
    # If all targets have the same value, this value stands for missing targets.
    same = target is not None and target.lowest == target.highest
    told = f" ({target.lowest:.4g})" if same and target is not None and not drawn else ""
    nothing = origin.operation in _DIVISIONS and origin.lowest == origin.highest == 0.0
    counted = origin.from_mask or (origin.made_by in _COUNTS and not origin.from_weights)
    empty = origin.empty and (drawn or origin.operation.startswith(_CLASS_LOSSES))
    if empty or (drawn and nothing and counted):
        text = "a mask or a selection selects nothing: a mean over no elements"
    elif origin.operation.startswith(_CLASS_LOSSES) and not origin.given:
        text = f"every target of the batch is ignored{told} or has a weight of zero: a mean over no elements"
    elif same and origin.from_target and origin.from_mask and (nothing or origin.empty):
        text = f"every target of the batch is the same{told}, and a mask or a selection selects none of them"
    else:
        return None
    if not drawn:
        text += ". Leave such batches out, or leave this term out of the loss if nothing is selected."
        return finding_at("no_valid_target", thresholds.confidence.no_valid_target, origin, text)
    text += (
        ". The random numbers of the step decide what is selected: with others, the same batch is finite. Draw so that "
        "something is always selected, or divide the sum by a count of at least 1."
    )
    return drawn_at("no_valid_target", thresholds.confidence.random_draw, case, text)


def labels_unrelated(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Labels that are unrelated to their inputs, for example because only one of the two was shuffled."""
    labels = case.clues.labels
    if labels is None or labels.exceeds:
        return None
    return Finding(
        "labels_unrelated",
        thresholds.confidence.labels_unrelated,
        evidence={"rows": float(labels.rows), "shared": labels.shared, "chance": labels.chance},
        place="the training data",
        suggestion=(
            f"{labels.shared:.1%} of {labels.rows:,} rows of the data set have the same label as the row with the most "
            f"similar input; by chance it would be {labels.chance:.1%}. The labels may be unrelated to the inputs: "
            "look for code that shuffles, sorts or joins only one of the two."
        ),
    )


def unnormalised_input(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Inputs far from zero mean and unit variance."""
    fault, evidence, inputs, known = case.fault, case.evidence, case.clues.inputs, thresholds.confidence
    if inputs is None:
        return None
    far = _unlike_others("unnormalised_input", case, inputs, "Clean the data, or clip the inputs.", thresholds)
    if far is not None:
        return far
    if not inputs_are_large(case, thresholds.data):
        return None
    harm = harm_of_large_inputs(case.model, thresholds.model)
    course, limits = case.course, thresholds.plateau
    stuck = course is not None and course.high(limits) and not course.moves(limits)
    diverged = bool(harm) or stuck or learner_diverged(fault, evidence, thresholds)
    if not diverged and evidence.healthy_steps >= thresholds.data.trusted_steps and "gradient" not in fault.place:
        return None  # the run has been healthy with such inputs
    return Finding(
        "unnormalised_input",
        known.unnormalised_harm if diverged else known.unnormalised,
        evidence=range_evidence(inputs),
        place=f"field {inputs.field} of the batch",
        suggestion=(
            f"{harm}the input runs from {inputs.lowest:.4g} to {inputs.highest:.4g} with mean {inputs.mean:.4g} and "
            f"standard deviation {inputs.std:.4g}. Subtract the mean and divide by the standard deviation, or begin "
            "with a normalisation layer."
        ),
    )
