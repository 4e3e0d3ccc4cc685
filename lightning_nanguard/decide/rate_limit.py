"""A learning-rate cut that respects the rate a finding allows."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard.types import Finding, Plan, Scale


def within_curvature(plan: Plan, finding: Finding | None, lr: float | None) -> Plan:
    """The plan, whose cut knows of the rate that the finding allows.

    Along one gradient the curvature of an untrained model may say a ten-thousandth of what a rehearsal shows to be
    right, so it holds where nothing can be rehearsed. Where the loss is ill-conditioned the steepest direction was
    looked for, and it holds altogether.

    Args:
        plan: What is to be done.
        finding: Why; ``None`` where that is not known.
        lr: Effective learning rate of now.
    """
    allowed = None if finding is None else finding.evidence.get("largest_rate")
    if not isinstance(allowed, float) or not lr or not 0 < allowed < lr:
        return plan
    most, firm = allowed / lr, finding is not None and finding.cause == "ill_conditioned"
    return tuple(
        replace(step, most=most, firm=firm) if isinstance(step, Scale) and step.factor < 1 else step for step in plan
    )
