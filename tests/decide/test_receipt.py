"""What an intervention has gained or cost, by the losses of the same batches with it and without."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard.decide.receipt import Judged, judge_receipt
from lightning_nanguard.thresholds.trial import TrialThresholds

LIMITS = TrialThresholds()


def levels(run: float, without: float, noise: float = 0.0) -> tuple[list[float], list[float]]:
    """Twenty batches under both: each batch has a difficulty of its own, and each loss some noise."""
    draw = random.Random(0)
    hard = [draw.gauss(0, 0.5) for _ in range(20)]
    mine, other = ([level + one + noise * draw.gauss(0, 1) for one in hard] for level in (run, without))
    return mine, other


@pytest.mark.parametrize(
    ("run", "without", "start", "verdict", "back", "plain"),
    [
        (1.0, 1.8, 3.0, "gained", False, False),
        (1.0, 2.2, 3.0, "gained", False, True),
        (1.0, math.inf, 3.0, "gained", False, True),
        (1.8, 1.0, 3.0, "cost", True, False),
        (1.05, 1.0, 3.0, "no difference", False, False),
        (1.0, 1.05, 3.0, "no difference", False, False),
        (5.0, 4.0, 3.0, "cost", False, False),
        (2.0, 1.0, None, "cost", False, False),
        (1.0, 1.0, 3.0, "no difference", False, False),
        (math.nan, 1.0, 3.0, "cost", False, False),
    ],
    ids=[
        "better",
        "far better",
        "other lost",
        "worse",
        "hardly worse",
        "hardly better",
        "both lost",
        "no start",
        "alike",
        "run lost",
    ],
)
def test_size_decides(run: float, without: float, start: float | None, verdict: str, back: bool, plain: bool) -> None:
    """Which is better is said where a few batches do not decide it and the share is clear. What cost is taken back. A
    share above a half is plain."""
    assert judge_receipt(*levels(run, without), start, LIMITS)[:3] == (verdict, back, plain)


def test_noise_is_no_difference() -> None:
    """Where batches disagree, nothing is said and nothing is taken back."""
    mine, other = levels(1.2, 1.0, noise=1.0)
    assert judge_receipt(mine, other, 3.0, LIMITS) == Judged(
        "no difference", reason="neither is better on enough of them"
    )
    assert judge_receipt(mine, other, 3.0, replace(LIMITS, left_out=0.0, lacks=0.0))[0] == "gained"


def test_the_reason_why_a_difference_does_not_count() -> None:
    """Losses that are far from each other and about the same share of what was learned: the reason says the share."""
    judged = judge_receipt([7.862] * 20, [71.82] * 20, 12_410.0, LIMITS)
    assert judged == Judged("no difference", reason="the difference is 0.52 % of what has been learned since the start")


def test_mean_and_median_have_to_agree() -> None:
    """A loss with heavy tails, lower on most batches and far higher on some, is neither a gain nor a cost."""
    mine, other = [1.0] * 14 + [50.0] * 6, [2.0] * 14 + [3.0] * 6
    for pair in ((mine, other), (other, mine)):
        assert judge_receipt(*pair, 60.0, replace(LIMITS, lacks=0.0)).verdict == "no difference"


@given(st.integers(-60, 60), st.tuples(*[st.floats(0.1, 10.0)] * 3), st.floats(0.0, 0.5))
@settings(max_examples=100)
def test_the_unit_of_the_loss_does_not_matter(exponent: int, at: tuple[float, float, float], noise: float) -> None:
    """Losses in another unit lead to the same verdict, bit by bit."""
    mine, other = levels(at[0], at[1], noise)
    unit = 2.0**exponent
    scaled = judge_receipt([unit * one for one in mine], [unit * one for one in other], unit * at[2], LIMITS)
    assert scaled == judge_receipt(mine, other, at[2], LIMITS)
