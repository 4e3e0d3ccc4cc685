"""Single samples of a collated batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from lightning_nanguard import sample_hash
from lightning_nanguard.measure.batches import named_tensors
from lightning_nanguard.measure.sample_parts import among, hash_of, is_separable, select_samples
from tests.helpers import same_bits

SAMPLES: dict[str, list[Any]] = {
    "pairs": [(torch.arange(3.0) + i, i) for i in range(4)],
    "named": [{"x": torch.full((2, 2), float(i)), "name": f"s{i}", "y": float(i)} for i in range(4)],
    "nested": [{"a": (np.float32(i), np.arange(2) + i), "b": [torch.tensor(i), "w" * i]} for i in range(4)],
    "not finite": [(torch.tensor([float("nan"), i]), float("inf")) for i in range(4)],
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_part_is_what_the_loader_would_have_given(kind: str) -> None:
    """The part of a batch is bit by bit the batch of those samples, words included."""
    samples = SAMPLES[kind]
    assert is_separable(default_collate(samples), 4)
    for chosen in ([2], [0, 3], [1, 1]):
        assert same_bits(
            select_samples(default_collate(samples), chosen), default_collate([samples[i] for i in chosen])
        )


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_hash_finds_the_sample_again(kind: str) -> None:
    """The hash of a sample of the data set is that of its place in any batch, and no other sample's."""
    batch = default_collate(SAMPLES[kind])
    hashes = [sample_hash(one) for one in SAMPLES[kind]]
    assert hashes == [hash_of(batch, index) for index in range(4)]
    assert len(set(hashes)) == 4


def test_not_separable() -> None:
    """A batch in which a tensor has another number of entries, or none, cannot be taken apart."""
    assert not is_separable([torch.zeros(4, 2), torch.zeros(3)], 4)
    assert not is_separable([torch.zeros(4, 2), torch.tensor(1.0)], 4)
    assert not is_separable(["words"], 1)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_among_others(kind: str) -> None:
    """The tensors of a sample and of a batch are one batch, unless their shapes differ."""
    first, *others = SAMPLES[kind]
    made = among(default_collate([first]), default_collate(others))
    tensors, whole = (dict(named_tensors(one)) for one in (made, default_collate([first, *others])))
    assert same_bits(tensors, whole)
    assert among(default_collate([first]), [torch.zeros(3, 7)]) is None
