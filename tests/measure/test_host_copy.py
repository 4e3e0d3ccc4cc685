"""Copies from the device to the host that nobody waits for."""

from __future__ import annotations

import torch

from lightning_nanguard.measure.host_copy import HostCopy


def test_a_copy_holds_the_numbers_of_when_it_was_made() -> None:
    """Numbers on the host have arrived at once, and later writes to the tensor do not reach the copy."""
    numbers = torch.tensor([1.0, 2.5], dtype=torch.float64)
    copy = HostCopy(numbers)
    numbers.zero_()
    assert copy.arrived()
    assert copy.read() == [1.0, 2.5]
