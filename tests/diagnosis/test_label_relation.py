"""Whether labels have anything to do with their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nanguard.diagnosis.label_relation import label_relation
from lightning_nanguard.thresholds.mistakes import LabelThresholds

LIMITS = LabelThresholds()


def data(rows: int = 600) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (rows,), generator=g)
    return torch.randn(rows, 12, generator=g) + torch.eye(12)[y], y


def test_related_labels_and_others() -> None:
    """Neighbours share a label more often than by chance; not where the labels are those of other rows."""
    x, y = data()
    before = torch.get_rng_state()
    related, other = label_relation([(x, y)], LIMITS), label_relation([(x, y.roll(7))], LIMITS)
    assert torch.equal(before, torch.get_rng_state())
    assert related is not None
    assert related.exceeds
    assert related.shared > 0.3
    assert other is not None
    assert not other.exceeds
    assert other.chance == pytest.approx(0.25, abs=0.02)
    assert label_relation([(x[:300], y[:300]), (x[300:], y[300:])], LIMITS) == related


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [data(rows=100)],
        [(data()[0].sign(), data()[1])],
        [(data()[0], data()[1].float())],
        [(data()[1], data()[1])],
        [(data()[0], torch.arange(600))],
        [data()[0]],
        [data(), (data()[0][:, :5], data()[1])],
    ],
    ids=["nothing", "few", "two values", "regression", "no reals", "one row a class", "no labels", "ragged"],
)
def test_where_it_cannot_be_told(batches: list[Any]) -> None:
    """Nothing is said without classes, real inputs of more than two values, and enough rows of one shape."""
    assert label_relation(batches, LIMITS) is None
