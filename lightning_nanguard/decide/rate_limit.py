"""Limits a cut of the learning rate by a finding, or removes it if the rate is not to blame."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_nanguard.types import Evidence, Finding, Plan, Scale


def within_curvature(plan: Plan, finding: Finding | None, lr: float | None) -> Plan:
    """The plan, with the rate that the finding allows entered in its cut as ``Scale.most``.

    That rate comes from the curvature along one gradient. For an untrained model it may be a ten-thousandth of the rate
    that trials show to be right, so it bounds the cut only where no rates can be tried. In an ill-conditioned loss the
    curvature is that of the steepest direction, so it bounds the cut in any case (``Scale.firm``).

    Args:
        plan: What is to be done.
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
    """The plan without a cut of the rate, where the finding blames the batch and the weights are not known to be bad.

    That the good weights do better on this batch shows it only if they do so on others, too.

    Args:
        plan: What is to be done.
        finding: The cause found; ``None`` without one.
        evidence: What is known of the fault.
    """
    comparison = evidence.comparison
    better = comparison is not None and comparison.then_finite is not False and math.isfinite(comparison.then)
    worse = better and not evidence.holds_elsewhere
    if finding is None or finding.scope != "batch" or worse or evidence.climbing or evidence.rate_rose:
        return plan
    return tuple(step for step in plan if not (isinstance(step, Scale) and step.factor < 1))
