"""What is sent to the host, timed and allocated on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nanguard.state.device import Device, HostCopy, TorchDriver, pinned_bytes, random_generator
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

    copy = HostCopy(torch.tensor([1.5, 2.5]).as_subclass(OnMps), TorchDriver())
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
