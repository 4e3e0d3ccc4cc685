"""Clipping that is turned on in mid-run."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from lightning_nanguard.act.clipping import Clipper


def gradient(size: float) -> torch.Tensor:
    return torch.full((8,), size / math.sqrt(8))


@pytest.mark.parametrize("size", [0.5, 1.0, 1.5, 3.0, 1e6])
def test_a_norm_that_is_known_clips_as_one_that_is_measured(size: float) -> None:
    """Handing the norm in saves a pass over the gradients, and changes none of them by more than rounding."""
    clipper, clipped = Clipper(), []
    clipper.set(1.0, "norm")
    for known in (None, torch.tensor(size)):
        clipped.append(gradient(size))
        clipper.clip(clipped[-1:], norm=known)
    assert torch.allclose(*clipped, rtol=1e-6)
    assert float(clipped[0].norm()) == pytest.approx(min(size, 1.0), rel=1e-5)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_sparse_gradients_are_clipped(algorithm: Literal["norm", "value"]) -> None:
    """What an embedding looked up twice counts once, and a step can be made with what is left."""
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 1.0)
    before = table.weight.detach().clone()
    (5 * table(torch.tensor([1, 1, 2])).sum()).backward()
    clipper = Clipper()
    clipper.set(1.0, algorithm)
    assert table.weight.grad is not None
    clipper.clip([table.weight.grad])
    optimizer.step()
    moved = before - table.weight.detach()
    size = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert float(size) == pytest.approx(1.0, rel=1e-5)
    assert bool((moved[1] > 0).all())
    assert not moved[3].any()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_clipped_at_the_scaled_value(algorithm: Literal["norm", "value"]) -> None:
    """Gradients still multiplied by a GradScaler's scale are clipped as if they were not."""
    clipper, scale = Clipper(), torch.tensor(128.0)
    clipper.set(1.0, algorithm)
    for dtype in (torch.float32, torch.float64):
        scaled = torch.full((1,), 3.0, dtype=dtype) * scale
        clipper.clip([scaled], scale)
        assert float(scaled / scale) == pytest.approx(1.0, rel=1e-5)


def test_the_smaller_value_holds_and_infinity_ends_it() -> None:
    """A second value of one algorithm only tightens, one of the other takes its place, ``inf`` ends clipping."""
    clipper = Clipper()
    clipper.clip([large := gradient(5.0)])
    assert torch.equal(large, gradient(5.0))
    values = []
    for value, algorithm in ((2.0, "norm"), (3.0, "norm"), (1.0, "norm"), (4.0, "value"), (math.inf, "value")):
        clipper.set(value, algorithm)  # type: ignore[arg-type]
        values.append(clipper.value)
    assert values == [2.0, 2.0, 1.0, 4.0, None]


def test_state_round_trip() -> None:
    """A resumed run clips as before, at the same value by the same algorithm."""
    clipper, other = Clipper(), Clipper()
    clipper.set(0.5, "value")
    other.load_state_dict(clipper.state_dict())
    assert other.state_dict() == {"value": 0.5, "algorithm": "value"}
    other.clip([one := torch.tensor([3.0, -3.0])])
    assert one.tolist() == [0.5, -0.5]
