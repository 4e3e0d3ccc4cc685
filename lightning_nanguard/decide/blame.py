"""Finds what is at fault: the batch, the learner, the state, or nothing. Pure functions of fault and evidence."""

from __future__ import annotations

import math

from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.types import Comparison, Evidence, Fault, Scope


def find_scope(fault: Fault, evidence: Evidence, limits: BlameThresholds) -> Scope | None:
    """Find what is at fault: the batch, the learner or the state; ``None`` if the fault was a false alarm."""
    if fault.scope == "state":
        return "learner" if fault.rate_may_cause and (evidence.rate_rose or made_worse(evidence)) else "state"
    if fault.conclusive:
        return fault.scope
    if evidence.corrupt is not None:
        return "learner" if evidence.climbing or evidence.rate_rose else "state"
    if evidence.jump is not None and fault.scope == "batch":
        return "learner" if learner_did_it(evidence, limits) else "state"
    if fault.scope == "learner":
        confirmed = fault.proof == "none" or (evidence.trial is not None and evidence.trial.lacks > 0)
        return "learner" if confirmed else None
    return _batch_or_learner(fault, evidence, limits)


def made_worse(evidence: Evidence) -> bool:
    """Whether updates made the state so, and it is no better than the one before. Some weights have far to go."""
    # The losses of a divergence are no measure of how much losses differ.
    return evidence.redo_failed and (evidence.comparison is None or worse(evidence.comparison, 0.0))


def _batch_or_learner(fault: Fault, evidence: Evidence, limits: BlameThresholds) -> Scope:
    if evidence.batch_finite is False or evidence.batch_strange:
        return "batch"
    comparison = evidence.comparison
    least, sane = limits.worse_for_batch * evidence.loss_unit, _sane_loss(evidence, limits)
    if comparison is not None and worse(comparison, least, sane=sane) and not comparison.holds_elsewhere:
        return "learner" if learner_did_it(evidence, limits) else "state"
    if evidence.undo and comparison is None and evidence.healthy_since_restore is not None:
        return "learner" if evidence.healthy_since_restore < limits.calm_when_late else "batch"
    if comparison is not None and comparison.then_finite is False:
        return "batch"  # good weights have no finite gradient on it either
    if evidence.healthy_steps == 0 or evidence.healthy_since_restore == 0:
        return "batch"  # the state is still that of the start or the restore
    if not fault.certain and evidence.comparable:
        return "batch"  # a spike that lasts becomes the usual level
    holds = comparison is not None and comparison.holds_elsewhere
    patience = limits.patience_with_chance if holds else limits.patience
    if evidence.bad_in_a_row >= patience and evidence.bad_in_a_row % patience == 0:
        # If the loss is bad under good weights too, the data are at fault.
        data = comparison is not None and not comparison.then <= sane
        return "batch" if data else "learner"
    return "batch"


def worse(comparison: Comparison, least: float, *, sane: float = math.inf) -> bool:
    """Whether the present weights are clearly worse on the batch than the last good ones.

    Args:
        comparison: Loss of one batch under both weights.
        least: Smallest difference of the losses that counts.
        sane: If the loss under good weights is above this, the batch itself is at fault.
    """
    if not math.isfinite(comparison.then) or comparison.then > sane:
        return False
    return not math.isfinite(comparison.now) or comparison.now - comparison.then > least


def learner_did_it(evidence: Evidence, limits: BlameThresholds) -> bool:
    """Whether the learner caused a fault. A sudden fault after many healthy updates is not its fault."""
    # If the faulty update was made, bad weights alone do not blame the learner. They do if the fault follows soon
    # after a restore, or early in the run with a finite loss to show it.
    calm = limits.calm_when_late if evidence.undo else limits.calm
    blind = evidence.undo and not (evidence.comparison is not None and math.isfinite(evidence.comparison.now))
    soon = evidence.healthy_since_restore is not None and evidence.healthy_since_restore < calm
    return evidence.climbing or evidence.rate_rose or soon or (evidence.healthy_steps < limits.beginning and not blind)


def rate_rises(evidence: Evidence, limits: BlameThresholds) -> bool:
    """Whether the rate has clearly risen since the snapshot or the start, and so may rise above any cut."""
    if evidence.rate_rose:
        return True
    lowest = evidence.lowest_lr
    return evidence.lr is not None and lowest is not None and evidence.lr > limits.rate_risen * lowest


def _sane_loss(evidence: Evidence, limits: BlameThresholds) -> float:
    """The highest loss of a batch under good weights with which the batch itself is not at fault."""
    above, comparison = limits.sane_loss * evidence.loss_unit, evidence.comparison
    if comparison is not None and math.isfinite(comparison.then) and evidence.healthy_steps < limits.beginning:
        # The first losses do not show how much losses differ, so what the weights do to this one counts as well.
        worse_by = comparison.now - comparison.then if math.isfinite(comparison.now) else math.inf
        above = max(above, worse_by / limits.sane_loss)
    return evidence.first + above
