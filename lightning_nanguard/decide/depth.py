"""Chooses the certified snapshot of a rollback."""

from __future__ import annotations

from lightning_nanguard.types import Evidence


def depth_by_level(depth: int, evidence: Evidence, *, same_level: float, keeps: bool) -> int:
    """Number of snapshots to go back: at least ``depth``, and more while an older one has a clearly lower loss.

    Args:
        depth: Depth to begin with; 0 is the newest snapshot.
        evidence: Levels and unit of the loss.
        same_level: Loss units within which two snapshots have the same level.
        keeps: Whether to begin at a newer snapshot if the one at ``depth`` would lose half of what was learned.
    """
    levels = evidence.levels
    depth = min(depth, max(0, len(levels) - 1))
    known = [level for level in levels if level is not None]
    if not known:
        return depth
    best = min(known)
    keeps = keeps and best < evidence.first
    while keeps and depth > 0 and (level := levels[depth]) is not None and level - best > evidence.first - level:
        depth -= 1
    for index in range(depth, len(levels)):
        level = levels[index]
        if level is None or level <= best + same_level * evidence.loss_unit:
            return index
    return depth
