"""A first cheap look at a state."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nanguard.state.norm_screen import NormScreen


def test_a_look_at_a_wide_tensor_is_as_sharp() -> None:
    """The norm of a large embedding lies beyond what one element may be: once that was seen its largest element is sent
    too, and what is wrong with it shows as before."""
    wide, narrow = ("parameter", "embedding"), ("parameter", "bias")
    state = {wide: torch.ones(2_000_000), narrow: torch.ones(10)}
    first = NormScreen(state.items())
    assert first.arrived()
    assert first.beyond({}, 1e3) == {wide}
    for value, bad in ((1.0, set()), (999.0, set()), (1001.0, {wide}), (math.nan, {wide}), (-math.inf, {wide})):
        state[wide][12_345] = value
        assert NormScreen(state.items(), {wide}).beyond(first.typical, 1e3) == bad
        assert NormScreen(state.items(), {wide}).typical[narrow] == pytest.approx(1.0)


def test_growth_counts_from_the_least_magnitude() -> None:
    """A tensor of tiny numbers may grow many times over as long as it stays small."""
    key = ("parameter", "w")
    before = NormScreen([(key, torch.full((4,), 1e-6))]).typical
    now = NormScreen([(key, torch.full((4,), 10.0))])
    assert now.beyond(before, 1e3) == set()
    assert now.beyond(before, 1e3, least=1e-6) == {key}


def test_what_has_no_norm_is_left_out() -> None:
    """Integers and empty tensors say nothing; of several tensors with one key the smallest counts."""
    key = ("optimizer", 0, "w", "history")
    screen = NormScreen(
        [(("buffer", "n"), torch.ones(2, dtype=torch.int64)), (("buffer", "e"), torch.ones(0)),
         (key, torch.full((9,), 4.0)), (key, torch.full((4,), 2.0))]
    )  # fmt: skip
    assert screen.typical == {key: 2.0}
