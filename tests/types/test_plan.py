"""The steps of a plan."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields

import pytest

from lightning_nanguard.types import Clip, DropMoments, PlanStep, Restore, Scale, Skip, Stop


def test_steps_are_values() -> None:
    """Two steps that say the same are equal, and none can be changed on its way to the remedies."""
    steps = [Skip(), Restore(1), Scale(0.5), Clip(1.0), DropMoments(), Stop("why")]
    again = [Skip(), Restore(1), Scale(0.5), Clip(1.0), DropMoments(), Stop("why")]
    assert steps == again
    assert len({*steps, *again}) == len(steps)
    assert all(isinstance(step, PlanStep) for step in steps)
    for step in (Restore(), Scale(0.5), Clip(1.0), Stop("why")):
        name = fields(step)[0].name
        with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(step, name, 2)


def test_a_cut_is_bounded_by_nothing_unless_it_says_so() -> None:
    """A plan that only gives a factor may cut to any rate, and a remedy may try others."""
    cut = Scale(0.25)
    assert (cut.min_lr, cut.most) == (0.0, math.inf)
    assert (cut.limit, cut.firm, cut.tried, cut.clipped) == (False,) * 4
