"""Where snapshots lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nanguard.state import snapshot_placement
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.state.snapshot_placement import SnapshotPlacement
from tests.helpers import same_bits
from tests.state.nets import made


@pytest.mark.parametrize("alone", [True, False])
def test_without_room_snapshots_go_to_the_host(
    alone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They do from then on, and older ones are dropped, except among ranks, which must hold the same."""
    _, _, learner = made("adam")
    leaves = dict(learner.leaves())
    real, devices = snapshot_placement.capture, []

    def capture(*args: Any, **options: Any) -> Snapshot:
        devices.append(options["device"])
        if len(devices) == 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return real(*args, **options)

    monkeypatch.setattr(snapshot_placement, "capture", capture)
    ring = Ring()
    ring.certified = [Snapshot(step, step, {}) for step in (2, 1)]
    placement = SnapshotPlacement(learner, ring, alone=alone)
    assert placement.beside
    for step in (3, 4):
        taken = placement.copy(step, step, leaves)
        assert same_bits(taken.leaves, leaves)
    assert devices == [None, torch.device("cpu"), torch.device("cpu")]
    assert not placement.beside
    assert len(ring.certified) == (1 if alone else 2)
    assert caplog.text.count("no room for another snapshot at step 3") == 1


def test_a_snapshot_whose_source_was_written_to_is_dropped() -> None:
    """It goes before the next update; copies that nobody disturbs stay."""
    net, _, learner = made("adam")
    ring = Ring()
    placement = SnapshotPlacement(learner, ring)
    for writes in (False, True):
        ring.add(placement.copy(1, 1, dict(learner.leaves())))
        placement._side_copy.send(lambda: None, list(net.parameters()))
        with torch.no_grad():
            _ = writes and net.last.weight.add_(1.0)
        placement.settle()
        assert (ring.pending is None) is writes
    assert not placement._overlap, "who has written once does so again"


def test_a_frozen_tensor_is_copied_beside_the_run_once_it_was_seen_to_stay() -> None:
    """Buffers, averages and a teacher are written to before the next update, weights are not."""
    net, _, learner = made("adam")
    placement = SnapshotPlacement(learner, Ring())
    frozen = ("parameter", "frozen")
    assert placement._changes_soon(("buffer", "mask"), net.mask)
    assert placement._changes_soon(("average", "EMA", "w"), net.mask)
    assert not placement._changes_soon(("parameter", "last.weight"), net.last.weight)
    assert placement._changes_soon(frozen, net.frozen)
    placement.unchanged = {frozen}
    assert not placement._changes_soon(frozen, net.frozen)
