"""The level below which a loss has none of the shapes that are judged by how high it is."""

from __future__ import annotations

from lightning_nanguard.detect.loss_shapes.view import loss_unit
from lightning_nanguard.thresholds.detection import DivergingLossThresholds


def harmless_below(first: float, best: float, since: int, patience: int, thresholds: DivergingLossThresholds) -> float:
    """The level: well below the untrained model's loss, and at most halfway from the best level up to it.

    Args:
        first: The untrained model's loss.
        best: The lowest loss level so far.
        since: Losses accepted since the start or the last rollback.
        patience: Readings over which a settled loss is judged.
        thresholds: When a loss counts as diverging.
    """
    unit = loss_unit(first)
    low = min(first - thresholds.learned * unit, 0.5 * (best + first))
    if patience <= since <= thresholds.stuck.max_updates:
        # In this period a loss that no longer falls may be stuck.
        low = min(low, first - thresholds.stuck.at_rest * unit)
    return low
