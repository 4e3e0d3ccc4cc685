"""Signs that a fault is the learner's own doing."""

from __future__ import annotations

import math

from lightning_nanguard.types import Evidence

# Healthy updates after a rollback before the learner is trusted again.
CALM = 200
# The same for a fault that was read late, where the weights cannot be compared with those before its update.
AT_ONCE = 20


def learner_did_it(evidence: Evidence, calm: int = CALM) -> bool:
    """Whether a fault was the learner's own doing; what comes out of nothing in a calm run was not.

    Args:
        evidence: What is known about the fault.
        calm: Updates accepted after a restore from which on the learner is trusted again.
    """
    # Behind an update that was made, bad weights are no sign by themselves: only if they are back at once, or early
    # on, where its loss says so.
    calm = AT_ONCE if evidence.undo else calm
    blind = evidence.undo and not (evidence.comparison is not None and math.isfinite(evidence.comparison.now))
    soon = evidence.healthy_since_restore is not None and evidence.healthy_since_restore < calm
    return evidence.climbing or evidence.rate_rose or soon or (evidence.healthy_steps < 20 and not blind)


def rate_rises(evidence: Evidence) -> bool:
    """Whether the rate has clearly risen, since the snapshot or before: it may go on and outgrow a multiplier."""
    lowest = evidence.lowest_lr
    return evidence.rate_rose or (evidence.lr is not None and lowest is not None and evidence.lr > 1.5 * lowest)
