"""Snapshots: copies of the learner, whose memory is used again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard.measure.tensors import dense_values
from lightning_nanguard.state import snapshot as snapshot_module
from lightning_nanguard.state.device import Device, OutOfMemory
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Share, Snapshot, capture, clone, copy_all, fits, put
from tests.helpers import copied, same_bits
from tests.odd_tensors import ODD, QUIET, set_to_zero
from tests.state.nets import made, train

pytestmark = [pytest.mark.filterwarnings(one) for one in QUIET]


def test_memory_is_taken_over() -> None:
    """A capture into a snapshot no longer needed allocates nothing new and does not touch another snapshot."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    old, kept = (capture(learner, step=1, global_step=1) for _ in range(2))
    places = {key: leaf.data_ptr() for key, leaf in old.leaves.items() if isinstance(leaf, Tensor)}
    saved = copied(kept.leaves)
    train(net, optimizer, 1, seed=2)
    new = capture(learner, step=2, global_step=2, reuse=old)
    assert {key: leaf.data_ptr() for key, leaf in new.leaves.items() if isinstance(leaf, Tensor)} == places
    assert same_bits(kept.leaves, saved)


def test_where_nothing_can_be_pinned_a_copy_is_made_all_the_same() -> None:
    """A host without pinned memory left, or without a device as here, gives ordinary memory."""
    copy = Device().pinned_like(torch.ones(3, 2).T)
    assert copy.device.type == "cpu"
    assert copy.shape == (2, 3)
    assert not copy.is_pinned()


def test_only_what_fits_is_copied_in_place() -> None:
    """Shape, dtype and layout must agree, and the live tensor must be writable."""
    saved = torch.zeros(2, 3)
    assert fits(torch.ones(2, 3), saved)
    for live in (
        torch.ones(3, 2),
        torch.ones(2, 3).double(),
        torch.ones(2, 3).to_sparse(),
        torch.ones(1, 3).expand(2, 3),
        1.0,
    ):
        assert not fits(live, saved)  # fmt: skip
    with torch.inference_mode():
        assert not fits(torch.ones(2, 3), saved)


def test_tensors_of_several_dtypes_are_copied_at_once() -> None:
    """Each target has its source's values afterwards, whatever the dtypes."""
    sources = [torch.arange(3.0), torch.arange(3), torch.ones(2, dtype=torch.float16)]
    targets = [torch.empty_like(source) for source in sources]
    copy_all(targets, sources, Device())
    assert same_bits(targets, sources)


def test_a_shared_snapshot_counts_its_own_part() -> None:
    """Bytes are those held by this rank."""
    share = Share(torch.zeros(16, dtype=torch.uint8), torch.Size([8]), torch.float32)
    taken = Snapshot(1, 1, {("parameter", "w"): share, ("buffer", "b"): torch.zeros(2)})
    assert taken.shared()
    assert taken.nbytes() == 16 + 8


@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_every_kind_are_copied_and_put_back(kind: str) -> None:
    """A copy keeps its numbers when the original changes, and puts them back in place."""
    live = ODD[kind]()
    if kind == "meta":
        assert clone(live, None).is_meta
        return
    before = dense_values(live).clone()
    copy = clone(live, None)
    assert (type(copy), copy.layout) == (type(live), live.layout)
    set_to_zero(live)
    assert dense_values(copy).flatten().tolist() == before.flatten().tolist()
    assert dense_values(live).flatten().tolist() != before.flatten().tolist()
    if fits(live, copy):
        copy_all([live], [copy], Device())
    else:
        assert put(live, copy)
    assert dense_values(live).flatten().tolist() == before.flatten().tolist()


def test_a_leaf_that_cannot_be_copied_is_left_out_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It is named once at INFO, and a restore neither removes it nor anything beside it."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=0)
    state = optimizer.state[net.first.weight]
    state["lock"] = lock = threading.Lock()
    with caplog.at_level("INFO"):
        for _ in range(2):
            snapshot = capture(learner, step=1, global_step=1)
    assert caplog.text.count("optimizer state lock of first.weight, a _thread.lock, cannot be copied") == 1
    state["exp_avg"].fill_(3.0)
    restore(learner, snapshot)
    assert state["lock"] is lock
    assert not bool((state["exp_avg"] == 3.0).any())


def test_a_copy_for_a_moment_goes_to_the_host_where_the_device_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put aside for a save or a look is put back from there."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=0)
    real = snapshot_module.capture

    def full(*args: Any, device: torch.device | None = None, **options: Any) -> Snapshot:
        if device is None:
            raise OutOfMemory("CUDA out of memory")
        return real(*args, device=device, **options)

    monkeypatch.setattr(snapshot_module, "capture", full)
    before = copied(dict(learner.leaves()))
    aside = snapshot_module.capture_whole(learner)
    assert aside.homes
    train(net, optimizer, 1, seed=1)
    restore(learner, aside)
    assert same_bits(dict(learner.leaves()), before)
