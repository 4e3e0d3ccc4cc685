"""Clipping is turned on where gradients are what explodes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_nanguard import ClipGradients, Fault
from lightning_nanguard.types import Clip, Evidence

GRADIENT = Fault("gradient_spike", "batch", "gradient", 1e6, certain=False, clipping_helps=True)
BAD_LOSS = Fault("collapsed", "learner", "loss", 2.3, certain=False)
EVIDENCE = Evidence(step=100, usual_norm=2.0, lr=0.1)


def test_auto_clipping_has_a_value_before_any_norm_was_usual() -> None:
    """Without healthy norms to take a value from it is the one most people start with."""
    assert ClipGradients().propose(GRADIENT, Evidence(step=1), 0) == Clip(1.0)


def test_an_optimizer_that_estimates_curvature_is_not_clipped() -> None:
    """Clipped gradients would spoil what LBFGS makes of their differences."""
    assert ClipGradients().propose(GRADIENT, replace(EVIDENCE, clippable=False), 0) is None


def test_a_rate_that_has_just_risen_is_suspected_first() -> None:
    """Clipping waits for the second attempt then."""
    risen = replace(EVIDENCE, rate_rose=True)
    assert [ClipGradients().propose(GRADIENT, risen, attempt) for attempt in (0, 1)] == [None, Clip(4.0)]


def test_a_gradient_out_of_nothing_that_led_to_a_bad_loss_is_clipped() -> None:
    """Though clipping does not help against such a loss by itself."""
    assert ClipGradients().propose(BAD_LOSS, EVIDENCE, 0) is None
    assert ClipGradients().propose(BAD_LOSS, replace(EVIDENCE, burst=True), 0) == Clip(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_val": 0.0}, r"ClipGradients\(clip_val=0.0\)"),
        ({"clip_val": math.inf}, r"ClipGradients\(clip_val=inf\)"),
        ({"clip_val": "much"}, r"ClipGradients\(clip_val='much'\)"),
        ({"algorithm": "value"}, r"ClipGradients\(algorithm='value'\).*auto"),
        ({"clip_val": 1.0, "algorithm": "l1"}, r"ClipGradients\(algorithm='l1'\)"),
        ({"recover_after": 0}, r"ClipGradients\(recover_after=0\)"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    """An argument out of range is named with its value when the object is made."""
    with pytest.raises(ValueError, match=message):
        ClipGradients(**arguments)
