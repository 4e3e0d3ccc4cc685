"""The learner's state of now against a snapshot: run code with that, and find what no update explains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.case import Change
from lightning_nanguard.state.learner import Learner, StateKey, describe
from lightning_nanguard.state.restore import part_of_snapshot
from lightning_nanguard.state.snapshot import Snapshot, capture_whole
from lightning_nanguard.thresholds.diagnosis import StateChangeThresholds

_STATE = StateChangeThresholds()


@contextmanager
def state_of_snapshot(learner: Learner, snapshot: Snapshot) -> Iterator[None]:
    """Run what is inside with the weights, buffers and moments of a snapshot, and put those of now back bit for bit.

    Args:
        learner: Whose state it is.
        snapshot: The state inside; the snapshot is not changed.
    """
    with part_of_snapshot(learner, snapshot, capture_whole(learner), _is_state):
        yield


def _is_state(path: StateKey) -> bool:
    return path[0] in ("parameter", "buffer", "optimizer")


def unexplained_change(
    learner: Learner, snapshot: Snapshot, thresholds: StateChangeThresholds = _STATE
) -> Change | None:
    """The trained weight of which a few elements moved out of all proportion to the rest since a snapshot.

    Updates move the elements of a tensor by amounts of one order; a flipped bit or a stray write moves one far out.
    """
    found: list[Change] = []
    for path, live in learner.weights():
        then = snapshot.leaves.get(path)
        plain = path[0] == "parameter" and live.requires_grad and live.is_floating_point()
        if not plain or then is None or then.shape != live.shape or live.numel() < 2 or live.layout != torch.strided:
            continue
        now = live.detach().double().flatten()
        change = _furthest_change(describe(path), then.to(now.device).double().flatten(), now, thresholds)
        if change is not None:
            found.append(change)
    return max(found, key=lambda change: abs(change.now), default=None)


def _furthest_change(name: str, before: Tensor, now: Tensor, thresholds: StateChangeThresholds) -> Change | None:
    moved = (now - before).abs()
    furthest = int(moved.argmax())
    others = moved[moved > 0]
    usual = 0.0
    if others.numel() > 1:
        # Of what moved at all, since an embedding moves a few rows; all but the furthest hundredth.
        rank = max(1, int(thresholds.usual_quantile * (others.numel() - 1)))
        usual = float(others.kthvalue(rank)[0])
    far, outside = float(moved[furthest]), thresholds.outside_factor * float(before.abs().max())
    # Neighbours that left their range as well were thrown there by an update, and it with them.
    stayed = usual <= outside or outside == 0
    if stayed and far > thresholds.moved_factor * usual and abs(float(now[furthest])) > outside and far > 0:
        return Change(name, float(before[furthest]), float(now[furthest]), usual)
    return None
