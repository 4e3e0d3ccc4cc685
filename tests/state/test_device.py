"""Room on a device, and copies beside the run."""

from __future__ import annotations

import pytest
import torch

from lightning_nanguard.state.device import DeviceMemory, DeviceTimer, SideStreamCopy, cuda_device


@pytest.mark.parametrize(
    ("free", "cached", "peak", "fits"), [(50, 30, 20, True), (10, 60, 20, True), (10, 60, 50, False)]
)
def test_room_is_what_the_peak_leaves(free: int, cached: int, peak: int, fits: bool) -> None:
    """What the allocator holds but never used at once is room as well; a twentieth is left free."""
    memory = DeviceMemory(total=100, free=free, cached=cached, peak=peak)
    assert memory.fits(40) is fits
    assert memory.is_negligible(5)
    assert not memory.is_negligible(6)


def test_what_is_written_to_while_it_is_copied_is_no_snapshot() -> None:
    """Weights that somebody changes between the copy's start and the next update would be torn."""
    weight = torch.zeros(3)
    copies = SideStreamCopy()
    assert copies.settle()
    copies.send(lambda: None, [weight])
    assert copies.waited() is None
    assert copies.settle()
    copies.send(lambda: None, [weight])
    weight.add_(1.0)
    assert not copies.settle()
    assert copies.settle(), "and it is forgotten"
    copies.send(lambda: None, [weight])
    weight.data = torch.zeros(3)
    assert not copies.settle()
    assert copies.waited() == 0.0


def test_without_a_device_nothing_is_timed() -> None:
    """On the CPU the host's clock sees everything."""
    timer = DeviceTimer()
    timer.start(cuda_device({"w": torch.zeros(2), "n": 3}))
    timer.stop()
    assert timer.seconds() is None
