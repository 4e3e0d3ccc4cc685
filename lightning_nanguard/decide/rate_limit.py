"""Bounds a cut of the learning rate by the largest rate that a finding allows."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard.types import Finding, Plan, Scale


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
