"""Conditions that several rules use: the kind of a fault, and whether the learner diverged."""

from __future__ import annotations

import math

from lightning_nanguard.decide.blame import find_scope, learner_did_it, worse
from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.thresholds.diagnosis import DataThresholds, DiagnosisThresholds
from lightning_nanguard.types import Evidence, Fault

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mul", "convolution", "linear", "square", "pow", "prod"})
"""Operations that multiply gradients in the backward pass."""


def in_gradient(fault: Fault) -> bool:
    """Whether the gradient is too large or not finite, and clipping helps against it."""
    return fault.clipping_helps and fault.place.startswith("gradient")


def gradient_not_finite(fault: Fault) -> bool:
    """Whether the loss is finite and its gradient is not."""
    return in_gradient(fault) and fault.certain and not (fault.value is not None and math.isfinite(fault.value))


def number_format_exhausted(fault: Fault) -> bool:
    """Whether the gradient overflows at any loss scale, so that the number format is at fault."""
    return fault.scope == "learner" and fault.certain and fault.proof == "none"


def learner_diverged(fault: Fault, evidence: Evidence, thresholds: DiagnosisThresholds) -> bool:
    """Whether updates made the weights bad, judged by the fault and its evidence."""
    if fault.scope == "learner" and not number_format_exhausted(fault):
        return True
    if evidence.corrupt is not None:
        return evidence.climbing or evidence.rate_rose
    comparison = evidence.comparison
    if not fault.certain and comparison is not None and comparison.now <= evidence.first:
        return False  # better than untrained, so it has not diverged
    grew = evidence.growth > thresholds.learner.grown and evidence.jump is None
    return worse_than_before(evidence, thresholds) and (learner_did_it(evidence, thresholds.blame) or grew)


def blamed_unseen(fault: Fault, evidence: Evidence, thresholds: DiagnosisThresholds) -> bool:
    """Whether the guard blames the learner for a large gradient or large weights, and no batch can be run again.

    Under manual optimization no loss can be compared with that of the last good weights.
    """
    grew = evidence.jump is not None or evidence.growth > thresholds.learner.grown
    large = in_gradient(fault) and not gradient_not_finite(fault)
    blamed = not evidence.comparable and find_scope(fault, evidence, thresholds.blame) == "learner"
    return blamed and fault.certain and (grew or large)


def worse_than_before(evidence: Evidence, thresholds: DiagnosisThresholds) -> bool:
    """Whether the present weights are clearly worse on the batch than the last good ones."""
    comparison = evidence.comparison
    if comparison is None or comparison.then_finite is False:
        return False  # the batch is bad under good weights, too
    # A batch with a high loss under good weights gives little evidence against the present weights.
    least = max(thresholds.learner.worse_units * evidence.loss_unit, comparison.then - evidence.first)
    return worse(comparison, least)


def inputs_are_large(case: Case, thresholds: DataThresholds) -> bool:
    """Whether the inputs are far from normalised, and nothing in the model normalises them first."""
    inputs = case.clues.inputs
    return inputs is not None and inputs.magnitude >= thresholds.unnormalised_rms and not case.clues.normalises
