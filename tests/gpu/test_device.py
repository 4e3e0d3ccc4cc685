"""What the fake device stands for on the CPU holds on a real one: the same copies, skips and graphs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_parts import PARTS, Bench
from lightning_nanguard.state.device import Device
from lightning_nanguard.state.side_copy import SideCopy
from tests.helpers import same_bits
from tests.state.test_side_copy import SMALL, sources

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("name", ["flags", "torn", "spike", "graphs", "foreign", "growth"])
def test_what_a_card_must_do(name: str) -> None:
    """Flags are read where they are trusted, torn copies are noticed, and graphs train on."""
    found = PARTS[name](Bench(DEVICE))
    assert found["ok"], found


def test_copies_beside_the_run_are_whole() -> None:
    """Every bit of every dtype and order of memory arrives, and the verdict says so."""
    device = Device()
    live = [tensor.to(DEVICE) for tensor in sources()]
    expected = [tensor.cpu() for tensor in live]
    targets = [device.pinned_like(tensor) for tensor in live]
    copies = SideCopy(device, SMALL)
    check = copies.send(targets, live)
    copies.settle()
    for tensor in live:
        tensor.zero_()
    assert check.intact()
    assert same_bits(targets, expected)
    assert all(target.is_pinned() for target in targets)


def test_room_is_known() -> None:
    """A card says how much it has, and how much was in use at once."""
    memory = Device().driver.memory(torch.device(DEVICE, torch.cuda.current_device()))
    assert 0 < memory.free <= memory.total
    assert memory.peak <= memory.total
