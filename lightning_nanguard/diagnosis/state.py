"""The learner's state now against a certified one: standing at that for a while, and what no update explains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_nanguard.diagnosis.clues import Change
from lightning_nanguard.state.learner import Learner, StateKey, describe
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture

# An element is out of place when it moved this many times as far as its neighbours did, and lies this many times as
# far out as any of its tensor did before.
_MOVED = 1e3
_OUT = 10.0


@contextmanager
def standing_at(learner: Learner, snapshot: Snapshot) -> Iterator[None]:
    """Run what is inside with the weights, buffers and moments of a snapshot, and put those of now back bit for bit.

    Args:
        learner: Whose state it is.
        snapshot: Where to stand; it is not changed.
    """
    mine = capture(learner, step=0, global_step=0)
    restore(learner, snapshot, keep=_is_state)
    try:
        yield
    finally:
        restore(learner, mine, keep=_is_state)


def _is_state(path: StateKey) -> bool:
    return path[0] in ("parameter", "buffer", "optimizer")


def out_of_place(learner: Learner, snapshot: Snapshot) -> Change | None:
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
        before = then.to(now.device).double().flatten()
        moved = (now - before).abs()
        furthest = int(moved.argmax())
        others = moved[moved > 0]
        # Of what moved at all, since an embedding moves a few rows; all but the furthest hundredth.
        usual = float(others.kthvalue(max(1, int(0.99 * (others.numel() - 1))))[0]) if others.numel() > 1 else 0.0
        far, range_before = float(moved[furthest]), float(before.abs().max())
        # Neighbours that left their range as well were thrown there by an update, and it with them.
        stayed = usual <= _OUT * range_before or range_before == 0
        if stayed and far > _MOVED * usual and abs(float(now[furthest])) > _OUT * range_before and far > 0:
            found.append(Change(describe(path), float(before[furthest]), float(now[furthest]), usual))
    return max(found, key=lambda change: abs(change.now), default=None)
