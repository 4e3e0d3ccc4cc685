"""Which of the first batches repeat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard.diagnosis.first_batches import FirstBatches
from lightning_nanguard.thresholds.mistakes import MistakeThresholds


def compared(batches: Iterable[Any], epoch: int = 100) -> tuple[int, tuple[int, int]]:
    """Number of batches that were looked at, and what was counted."""
    first = FirstBatches(MistakeThresholds())
    looked = next((index + 1 for index, one in enumerate(batches) if not first.see(one, first=index % epoch == 0)), -1)
    return looked, first.count()


def pictures(index: int) -> torch.Tensor:
    """Images with a black border."""
    images = torch.zeros(32, 1, 28, 28)
    images[:, :, 4:24, 4:24] = torch.rand(32, 1, 20, 20, generator=torch.Generator().manual_seed(index))
    return images


@pytest.mark.parametrize(
    "make",
    [
        pictures,
        lambda index: [pictures(index), torch.zeros(32)],
        lambda index: {"x": torch.full((4, 3), float(index)), "y": torch.zeros(4)},
        lambda index: (torch.arange(24).view(2, 3, 4).transpose(0, 2) + index, "a text"),
    ],
)
def test_five_batches_suffice_if_all_differ(make: Any) -> None:
    """Then the three others cannot be repetitions often enough."""
    assert compared(make(index) for index in range(9)) == (5, (0, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda index: (torch.ones(4, 4), torch.full((4,), float(index))),
        lambda index: {"mask": torch.ones(4, dtype=torch.bool), "x": torch.full((4,), index)},
        lambda index: (torch.full((4, 3), float(index)).bfloat16(),),
        lambda index: (torch.full((4, 3), float(index)).requires_grad_(),),
        lambda index: (torch.full((4,), complex(1, index)).conj(),),
        lambda index: (torch.ones(1).expand(70), torch.full((1,), float(index)).expand(70)),
        lambda index: ("a text", {"inner": (torch.full((4,), float(index)),)}),
        lambda index: (np.full((4, 3), float(index)), 3),
    ],
)
def test_several_fields_are_compared_if_the_first_repeats_or_cannot_be_read(make: Any) -> None:
    """The first field is a mask, a text, or of a type that NumPy does not have: the batches still differ."""
    looked, (batches, distinct) = compared(make(index) for index in range(12))
    assert looked in (8, 10)
    assert batches == distinct == 8


@pytest.mark.parametrize("period", [1, 2, 3, 4])
def test_batches_repeat(period: int) -> None:
    """However many different ones there are, up to half of those that are compared."""
    _, (batches, distinct) = compared((pictures(index % period), torch.zeros(32)) for index in range(16))
    assert (batches, distinct) == (8, period)


def test_workers_that_each_read_all() -> None:
    """Two workers give each batch twice."""
    _, (batches, distinct) = compared(pictures(index // 2) for index in range(16))
    assert (batches, distinct) == (8, 4)
    _, (batches, distinct) = compared(("a text", pictures(index // 2)) for index in range(16))
    assert (batches, distinct) == (8, 4)


def test_only_batches_of_one_epoch_are_compared() -> None:
    """Each epoch has the same three batches in the same order."""
    looked, (batches, distinct) = compared((pictures(index % 3) for index in range(9)), epoch=3)
    assert (looked, batches, distinct) == (-1, 0, 0)
    _, counted = compared((torch.arange(4.0) for _ in range(18)), epoch=8)
    assert counted == (8, 1)


def test_data_sets_without_data() -> None:
    """A step that has its own data is given zeros: they are not a mistake. Numbers that vary within a batch are."""
    assert compared((torch.zeros(4), torch.ones(1)) for _ in range(18)) == (10, (0, 0))
    assert compared((torch.zeros(4), torch.arange(4)) for _ in range(18)) == (10, (8, 1))


def test_batches_without_numbers_are_not_compared() -> None:
    """Texts and empty tensors say nothing."""
    assert compared(["a text"] * 9) == (1, (0, 0))
    assert compared([(torch.zeros(0, 3),)] * 9) == (1, (0, 0))


def test_no_batch_is_kept() -> None:
    """A few numbers are copied, in both ways of reading: later changes of the batch do not matter."""
    first, batch = FirstBatches(MistakeThresholds()), torch.zeros(4096)
    for index in range(10):
        assert first.see(batch, first=index == 0) is (index < 9)
        batch.fill_(index // 2)
    assert first.count() == (8, 5)
    assert max(part.untyped_storage().nbytes() for parts in first._kept for part in parts) <= 32 * 4
