"""Checksums of tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.measure.checksum import checksum


@given(st.integers(0, 63), st.integers(0, 6))
def test_a_checksum_sees_every_bit(bit: int, index: int) -> None:
    """One flipped bit changes it."""
    tensor = torch.arange(7, dtype=torch.float64)
    before = checksum([tensor])
    tensor.view(torch.int64)[index] ^= (1 << bit) if bit < 63 else -(1 << 63)
    assert checksum([tensor]) != before


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_a_checksum_sees_the_place(one: int, other: int) -> None:
    """Two values that change places change it, also in tensors of several rows and of odd sizes."""
    tensor = torch.arange(10_001, dtype=torch.float32)[1:]  # begins within a word of eight bytes
    before = checksum([tensor])
    swapped = tensor.clone()
    swapped[[one, other]] = swapped[[other, one]]
    assert (checksum([swapped]) != before) == (one != other)


def test_a_lazy_conjugate_has_the_checksum_of_its_numbers() -> None:
    """A conjugate or negative view is read by its values."""
    tensor = torch.randn(5, dtype=torch.complex64)
    assert checksum([tensor.conj()]) == checksum([tensor.conj().resolve_conj()]) != checksum([tensor])
    assert checksum([tensor.conj().imag]) == checksum([-tensor.imag])
