"""Copies beside the run: whole, or known to be torn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard.state.side_copy import SideCopy
from lightning_nanguard.thresholds.snapshots import PlacementThresholds
from tests.fake_device import fake_device
from tests.helpers import same_bits

SMALL = PlacementThresholds(staging_bytes=40)


def sources() -> list[Tensor]:
    """Tensors of several dtypes, orders of memory and sizes, one larger than the memory they go through."""
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 5, generator=draw),
        torch.randn(2, 3, 2, 2, generator=draw).contiguous(memory_format=torch.channels_last),
        torch.randn(7, generator=draw).bfloat16(),
        torch.randn((), generator=draw, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.randn(3, generator=draw, dtype=torch.complex64),
        torch.randn(4, 3, generator=draw).t(),
    ]


@pytest.mark.parametrize("when", ["late", "at once", "random"])
@pytest.mark.parametrize("devices", [1, 2])
def test_undisturbed_copies_are_whole(when: Any, devices: int) -> None:
    """Every bit arrives, whatever passes through the staging memory with it."""
    device, driver = fake_device(when, devices=devices)
    live = sources()
    for index, tensor in enumerate(live):
        driver.put(tensor, index % devices)
    expected = [tensor.clone() for tensor in live]
    targets = [device.pinned_like(tensor) for tensor in live]
    copies = SideCopy(device, SMALL)
    assert all(map(copies.can_take, live))
    check = copies.send(targets, live)
    if when == "late":
        assert not check.arrived()
        assert not same_bits(targets, expected)
    copies.settle()
    for tensor in live:
        tensor.copy_(torch.zeros(()))  # the next update
    assert check.intact()
    assert check.arrived()
    assert same_bits(targets, expected)
    assert copies.waited() == 0.0


def by_data(tensor: Tensor) -> None:
    tensor.data.view(-1)[1] += 1


def in_place(tensor: Tensor) -> None:
    tensor.view(-1)[1] += 1


def swapped_rows(tensor: Tensor) -> None:
    tensor.data.copy_(tensor.data.flip(0))


@pytest.mark.parametrize("write", [by_data, in_place, swapped_rows])
def test_whoever_writes_meanwhile_is_noticed(write: Callable[[Tensor], None]) -> None:
    """Also a write that torch counts nowhere, one that only moves numbers, and one that is taken back in the end."""
    device, driver = fake_device()
    live = sources()[:1]
    kept = live[0].clone()
    copies = SideCopy(device, SMALL)
    check = copies.send([device.pinned_like(live[0])], live)
    write(live[0])
    driver.finish()  # while averages are in the place of the weights, say
    live[0].data.copy_(kept)
    assert not check.intact()


def test_a_write_behind_the_copy_is_none_of_its_business() -> None:
    """What was copied already is what it was."""
    device, driver = fake_device()
    live = sources()[:1]
    target, expected = device.pinned_like(live[0]), live[0].clone()
    check = SideCopy(device, SMALL).send([target], live)
    driver.finish()
    live[0].data.zero_()
    assert check.intact()
    assert same_bits(target, expected)


def test_a_second_copy_waits_for_the_first() -> None:
    """Both go through the same memory."""
    device, _ = fake_device()
    live = torch.arange(6.0)
    copies = SideCopy(device, SMALL)
    one, other = device.pinned_like(live), device.pinned_like(live)
    first = copies.send([one], [live])
    second = copies.send([other], [live])
    assert copies.waited() is None
    assert first.intact()
    assert second.intact()
    assert same_bits([one, other], [live, live])


def test_tensors_with_gaps_are_left_to_others() -> None:
    """A view with gaps, or none at all, is not copied as memory is."""
    copies = SideCopy(fake_device()[0])
    assert not copies.can_take(torch.zeros(4, 4)[:, ::2])
    assert not copies.can_take(torch.zeros(3).expand(2, 3))
    assert not copies.can_take(torch.zeros(0))


def test_what_the_side_stream_reads_is_kept_until_the_run_waits_for_it() -> None:
    """Memory that is let go of earlier would be given to the next forward pass."""
    device, _ = fake_device()
    live = torch.arange(40.0)
    copies = SideCopy(device, SMALL)
    copies.send([device.pinned_like(live)], [live])
    pieces = 4  # of 40 bytes each
    assert len(copies._in_use) == 1 + pieces + 1
    copies.settle()
    assert copies._in_use == []
