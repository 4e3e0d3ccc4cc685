"""What is sent to the host, timed and allocated on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.state import device
from lightning_nanguard.state.device import (
    Device,
    Driver,
    HostCopy,
    host_blocks,
    pinned_bytes,
    random_generator,
)
from tests.fake_device import fake_device


def test_a_copy_holds_the_numbers_of_when_it_was_made() -> None:
    """Numbers on the host have arrived at once, and later writes to the tensor do not reach the copy."""
    numbers = torch.tensor([1.0, 2.5], dtype=torch.float64)
    copy = Device().read_later(numbers)
    numbers.zero_()
    assert copy.arrived()
    assert copy.read() == [1.0, 2.5]


@pytest.mark.parametrize("when", ["late", "at once", "random"])
def test_numbers_of_a_device_are_those_of_when_they_were_sent(when: Any) -> None:
    """They are read behind their event, whenever that comes about; before, the host's memory holds something else."""
    device, driver = fake_device(when)
    numbers = torch.tensor([1.5, -2.0])
    copy = device.read_later(numbers)
    numbers.zero_()
    if when == "late":
        assert not copy.arrived()
        assert copy._numbers.tolist() != [1.5, -2.0]
    assert copy.read() == [1.5, -2.0]
    assert copy.arrived()
    assert len(driver.pinned) == 1


def test_a_device_without_events_is_waited_for() -> None:
    """On MPS and XPU nothing says when a copy that was not waited for has arrived, so it is made when it is read."""
    sent: list[bool] = []

    class OnMps(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            sent.append(bool((kwargs or {}).get("non_blocking")))
            return super().__torch_function__(func, types, args, kwargs or {})

    copy = HostCopy(torch.tensor([1.5, 2.5]).as_subclass(OnMps), Driver())
    assert copy.read() == [1.5, 2.5]
    assert sent
    assert not any(sent)


def test_a_default_device_is_no_place_for_host_memory() -> None:
    """``torch.set_default_device`` says where the user's tensors go, not where the guard's numbers do."""
    device, driver = fake_device()
    numbers = torch.tensor([1.0, 2.0])
    with torch.device("meta"):
        assert Device().read_later(numbers).read() == [1.0, 2.0]
        assert device.read_later(numbers).read() == [1.0, 2.0]
        assert device.pinned_like(numbers).device.type == "cpu"
        driver.pins = False
        assert device.pinned_like(numbers).device.type == "cpu"


def test_what_pinning_takes_is_known() -> None:
    """Time for allocating pinned memory is added up; where there is none, other host memory is taken."""
    now = iter(range(100))
    device, driver = fake_device()
    timed = Device(driver, clock=lambda: float(next(now)))
    assert device.where(timed.pinned_like(torch.zeros(3, 2))) is None
    assert timed.pinning == 1.0
    driver.pins = False
    assert timed.pinned_like(torch.zeros(3, 2)).shape == (3, 2)
    assert timed.pinning == 2.0


def test_pinned_blocks_are_powers_of_two() -> None:
    """A tensor of a little more than a power of two takes twice as much of the host."""
    assert [pinned_bytes(size) for size in (1, 4096, 4097, 3 << 30)] == [1, 4096, 8192, 4 << 30]


def test_devices_are_timed_without_waiting() -> None:
    """The slowest of them counts; on the CPU nothing is timed, since the host's clock sees everything."""
    device, driver = fake_device(devices=2)
    one, other = torch.zeros(2), torch.zeros(3)
    driver.put(other, 1)
    assert device.devices([one, other, 3]) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    timer = device.timer([one, other])
    assert timer.seconds() is None
    timer.stop()
    for began, ended, milliseconds in zip(timer._began, timer._ended, (20.0, 70.0), strict=True):
        began.milliseconds, ended.milliseconds = 10.0, milliseconds  # type: ignore[attr-defined]
    assert timer.seconds() == pytest.approx(0.06)
    alone = Device().timer([one])
    alone.stop()
    assert alone.seconds() is None


def test_only_a_device_has_a_random_generator_of_its_own() -> None:
    """The host's is torch's default generator."""
    assert random_generator(torch.device("cpu")) is None


@given(st.lists(st.integers(0, 5000), max_size=30), st.sampled_from([64, 1024, 1 << 20]))
def test_blocks_hold_every_tensor_once(sizes: list[int], largest: int) -> None:
    """Each has room of its own at an aligned place, and a block is a power of two, which torch does not round up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "LARGEST_BLOCK", largest)
        patch.setattr(device, "LEAST_BLOCK", 256)
        blocks = host_blocks(sizes)
    assert sorted(index for _, places in blocks for index in places) == list(range(len(sizes)))
    for nbytes, places in blocks:
        assert nbytes == pinned_bytes(nbytes)
        ends = 0
        for index, start in sorted(places.items(), key=lambda one: one[1]):
            assert start % 64 == 0
            assert start >= ends
            ends = start + sizes[index]
        assert ends <= nbytes


def test_blocks_waste_little_of_a_large_model() -> None:
    """Of many tensors a little larger than a power of two, alone each would take nearly twice as much."""
    sizes = [90_177_536] * 300 + [16_384] * 200
    taken = sum(nbytes for nbytes, _ in host_blocks(sizes))
    assert taken < 1.05 * sum(sizes)
    assert sum(map(pinned_bytes, sizes)) > 1.4 * sum(sizes)


def test_memory_in_blocks_is_like_its_tensors() -> None:
    """Dtype, shape and order of memory are kept, and all of it lies in the host."""
    device, driver = fake_device()
    live = [torch.zeros(3, 5), torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)]
    live += [torch.zeros((), dtype=torch.bfloat16), torch.zeros(4, 3).t(), torch.zeros(0), torch.zeros(6)[::2]]
    made = device.pinned_alike(live)
    for one, other in zip(made, live, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert device.where(one) is None
    assert [one.stride() for one in made[:4]] == [one.stride() for one in live[:4]]
    assert len(driver.pinned) == 1
    for index, one in enumerate(made):
        one.fill_(index)
    assert [float(one.float().mean()) for one in made if one.numel()] == [0.0, 1.0, 2.0, 3.0, 5.0]
    driver.pins = False
    assert [one.shape for one in device.pinned_alike(live)] == [one.shape for one in live]
