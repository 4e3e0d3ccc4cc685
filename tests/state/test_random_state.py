"""Random streams, remembered before a step and put back."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from lightning_nanguard.state.random_state import RandomStreams
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from tests.helpers import differences, random_state, seed_all

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def test_every_stream_is_put_back() -> None:
    """A step that draws from torch, Python and NumPy draws the same numbers again, in checked steps and in others."""
    seed_all()
    streams = RandomStreams(CPU)
    for _ in range(70):
        before = streams.open()
        drawn = draw()
        streams.close()
        after = random_state()
        before.restore()
        assert draw() == drawn
        assert differences(random_state(), after) == []


def test_a_stream_that_steps_do_not_draw_from_costs_nothing_and_is_left_alone() -> None:
    """What a data loader draws between steps stays drawn, and Python's and NumPy's streams are not copied for it."""
    seed_all()
    streams = RandomStreams(CPU)
    for _ in range(12):
        random.random()
        np.random.rand()
        before = streams.open()
        torch.rand(3)
        streams.close()
    assert [position is None for position in before.positions] == [False, True, True]
    assert len(before.torch) == 1
    assert all(position is not None for position in streams.now().positions)


def test_a_step_that_begins_to_draw_is_noticed() -> None:
    """The next check finds it, and from then on the stream is remembered before every step."""
    seed_all()
    streams = RandomStreams(CPU, replace(RepeatedStepsThresholds(), checked_every=8))
    for step in range(20):
        before = streams.open()
        drawn = random.random() if step >= 4 else None
        streams.close()
        if step > 8:
            before.restore()
            assert random.random() == drawn, step


def test_other_positions_give_other_numbers() -> None:
    """Every stream draws other numbers from elsewhere, the same for the same seed."""
    before = RandomStreams(CPU).now()

    def from_elsewhere(seed: int) -> list[float]:
        before.elsewhere(seed).restore()
        return draw()

    try:
        first, again, other = from_elsewhere(101), from_elsewhere(101), from_elsewhere(102)
        before.restore()
        own = draw()
    finally:
        before.restore()
    assert first == again
    assert all(len({a, b, c}) == 3 for a, b, c in zip(first, other, own, strict=True))
