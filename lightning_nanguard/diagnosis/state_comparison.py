"""Compares the present state of the learner with a snapshot, and runs code with a snapshot's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.case import Change
from lightning_nanguard.state.learner import Learner, describe
from lightning_nanguard.state.restore import part_of_snapshot
from lightning_nanguard.state.snapshot import Snapshot, capture_whole
from lightning_nanguard.thresholds.diagnosis import DEFAULT, StateChangeThresholds


@contextmanager
def state_of_snapshot(learner: Learner, snapshot: Snapshot) -> Iterator[None]:
    """Run the block with the state of a snapshot, and restore the present state bit for bit.

    Args:
        learner: The learner.
        snapshot: Its weights, buffers and moments are used. The snapshot is not changed.
    """
    used = ("parameter", "buffer", "optimizer")
    with part_of_snapshot(learner, snapshot, capture_whole(learner), lambda key: key[0] in used):
        yield


def unexplained_change(
    learner: Learner, snapshot: Snapshot, thresholds: StateChangeThresholds = DEFAULT.state
) -> Change | None:
    """The trained weight in which a few elements changed far more than the rest since a snapshot.

    Updates change the elements of a tensor by similar amounts. A bit flip or memory corruption changes one far more.
    If one element alone moved, the other weights show whether an update did it (:attr:`Change.updated`).
    """
    found: list[Change] = []
    left: set[str] = set()
    for path, live in learner.weights():
        then = snapshot.leaves.get(path)
        plain = path[0] == "parameter" and live.requires_grad and live.is_floating_point()
        if not plain or then is None or then.shape != live.shape or live.numel() < 2 or live.layout != torch.strided:
            continue
        now = live.detach().double().flatten()
        change = _furthest_change(describe(path), then.to(now.device).double().flatten(), now, thresholds)
        if isinstance(change, Change):
            found.append(change)
        elif change is not None:
            left.add(change)
    # An element that alone has a gradient has no others to be compared with.
    found = [replace(change, updated=bool(left) and not change.usual) for change in found]
    return max(found, key=lambda change: (not change.updated, abs(change.now)), default=None)


def _furthest_change(name: str, before: Tensor, now: Tensor, thresholds: StateChangeThresholds) -> Change | str | None:
    """The change of the element that moved most, if it is far from the others; the name if all left their range."""
    moved = (now - before).abs()
    furthest = int(moved.argmax())
    others = moved[moved > 0]
    usual = 0.0
    if others.numel() > 1:
        # A high quantile of the elements that changed at all, because only a few rows of an embedding change.
        rank = max(1, int(thresholds.usual_quantile * (others.numel() - 1)))
        usual = float(others.kthvalue(rank)[0])
    far, outside = float(moved[furthest]), thresholds.outside_factor * float(before.abs().max())
    # If the other elements left their range, too, an update changed all of them.
    if usual > outside > 0:
        return name
    if far > thresholds.moved_factor * usual and abs(float(now[furthest])) > outside and far > 0:
        return Change(name, float(before[furthest]), float(now[furthest]), usual)
    return None
