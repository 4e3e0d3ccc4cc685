"""Limits a cut of the learning rate by a finding, or removes it if the rate is not to blame."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_nanguard.types import Evidence, Finding, Plan, Scale


def within_curvature(plan: Plan, finding: Finding | None, lr: float | None) -> Plan:
    """Add the largest rate that the finding allows to the cut of a plan, as ``Scale.most``.

    This rate comes from the curvature along one gradient. For an untrained model it may be 10,000 times lower than the
    best rate, so it limits the cut only if no rates can be tried. For an ill-conditioned loss it comes from the
    steepest direction, so it always limits the cut (``Scale.firm``).

    Args:
        plan: The plan.
        finding: The cause found; ``None`` without one.
        lr: The present effective learning rate.
    """
    allowed = None if finding is None else finding.evidence.get("largest_rate")
    if not isinstance(allowed, float) or not lr or not 0 < allowed < lr:
        return plan
    most, firm = allowed / lr, finding is not None and finding.cause == "ill_conditioned"
    return tuple(
        replace(step, most=most, firm=firm) if isinstance(step, Scale) and step.factor < 1 else step for step in plan
    )


def spare_rate(plan: Plan, finding: Finding | None, evidence: Evidence) -> Plan:
    """Remove the cut from a plan if the finding blames the batch and the weights are not known to be bad.

    A better loss of the good weights on this batch proves bad weights only if they are better on other batches, too.

    Args:
        plan: The plan.
        finding: The cause found; ``None`` without one.
        evidence: The evidence about the fault.
    """
    comparison = evidence.comparison
    worse = (
        comparison is not None
        and comparison.then_finite is not False
        and math.isfinite(comparison.then)
        and not comparison.holds_elsewhere
    )
    if finding is None or finding.scope != "batch" or worse or evidence.climbing or evidence.rate_rose:
        return plan
    return tuple(step for step in plan if not (isinstance(step, Scale) and step.factor < 1))
