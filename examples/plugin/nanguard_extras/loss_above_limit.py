"""A diagnosis rule that names the cause of the fault that ``LossAbove`` finds."""

from __future__ import annotations

from lightning_nanguard import Case, Finding


def loss_above_limit(case: Case) -> Finding | None:
    """The cause of a loss above the limit, ``None`` for any other fault."""
    if case.fault.kind != "loss_above" or case.fault.value is None:
        return None
    return Finding(
        "loss_above_limit",
        confidence=0.99,
        evidence={"loss": case.fault.value},
        place="loss",
        suggestion="Look at this batch, or raise the limit of LossAbove.",
    )
