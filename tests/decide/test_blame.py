"""Who is blamed for a fault: by its traits and the evidence, whatever its kind is called."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.decide.blame import find_scope, learner_did_it, rate_rises, worse
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.types import Comparison, Evidence, Scope, Trial

LIMITS = BlameThresholds()
CALM = Evidence(step=500, healthy_steps=480, first=2.3, loss_unit=2.3, lr=0.1)
LOST = Comparison(math.nan, 1.0)
HOLDS = Comparison(math.nan, 1.0, holds_elsewhere=True)
FAILED = {"redo_failed": True}
OWN = Fault("something_of_my_own", "learner", "loss", 5.0, certain=False)


@pytest.mark.parametrize(
    ("traits", "evidence", "scope"),
    [
        ({"proof": "none"}, {}, "learner"),
        ({}, {"trial": Trial(0.5)}, "learner"),
        ({}, {"trial": Trial()}, None),
        ({}, {"growth": 1e3}, None),
        ({"certain": True}, {}, None),
        ({"scope": "batch"}, {"comparison": Comparison(1.0, 1.0)}, "batch"),
        ({"scope": "batch", "certain": True}, {"bad_in_a_row": 4, "comparison": Comparison(1.0, 1.0)}, "learner"),
        ({"scope": "batch"}, {"bad_in_a_row": 4, "comparison": Comparison(1.0, 1.0)}, "batch"),
        ({"scope": "batch", "certain": True}, {"comparison": LOST, "healthy_steps": 9}, "learner"),
        (
            {"scope": "batch", "certain": True},
            {"comparison": HOLDS, "healthy_steps": 9},
            "batch",
        ),
        (
            {"scope": "batch", "certain": True},
            {"bad_in_a_row": 8, "comparison": HOLDS},
            "batch",
        ),
        (
            {"scope": "batch", "certain": True},
            {"bad_in_a_row": 64, "comparison": HOLDS},
            "learner",
        ),
        # The batch is a little harder than the first one, which is all that is known of how losses differ.
        ({"scope": "batch"}, {"comparison": Comparison(3e6, 2.4), "healthy_steps": 1, "loss_unit": 1e-12}, "learner"),
        ({"scope": "batch"}, {"comparison": Comparison(math.inf, 2.4), "healthy_steps": 1, "loss_unit": 0}, "learner"),
        ({"scope": "batch"}, {"comparison": Comparison(9e6, 8e6), "healthy_steps": 1, "loss_unit": 1e-12}, "batch"),
        ({"scope": "batch"}, {"comparison": Comparison(math.nan, 99), "climbing": True}, "batch"),
        ({"scope": "batch", "conclusive": True}, {"corrupt": "parameter w"}, "batch"),
        ({"scope": "state"}, {"rate_rose": True}, "state"),
        ({"scope": "state", "rate_may_cause": True}, {"rate_rose": True}, "learner"),
        ({"scope": "state", "rate_may_cause": True}, FAILED, "learner"),
        (
            {"scope": "state", "rate_may_cause": True},
            FAILED | {"comparison": Comparison(9e9, 2.0)},
            "learner",
        ),
        (
            {"scope": "state", "rate_may_cause": True},
            FAILED | {"comparison": Comparison(1.0, 2.0)},
            "state",
        ),
        ({"scope": "state"}, FAILED, "state"),
    ],
)
def test_traits_route_a_fault_of_ones_own(
    traits: dict[str, object], evidence: dict[str, object], scope: Scope | None
) -> None:
    """A fault of a user's own is treated like a built-in one with the same traits."""
    fault = dataclasses.replace(OWN, **traits)  # type: ignore[arg-type]
    assert find_scope(fault, dataclasses.replace(CALM, **evidence), LIMITS) == scope  # type: ignore[arg-type]


def test_a_threshold_is_set_without_patching() -> None:
    """Another threshold, another verdict."""
    evidence = dataclasses.replace(CALM, healthy_steps=30)
    assert learner_did_it(evidence, dataclasses.replace(LIMITS, beginning=40))
    assert not learner_did_it(evidence, LIMITS)


@pytest.mark.parametrize(
    ("now", "then", "least", "sane", "expected"),
    [
        (2.0, 1.0, 0.1, math.inf, True),
        (1.05, 1.0, 0.1, math.inf, False),
        (2.0, 1.0, 1.5, math.inf, False),
        (math.nan, 1.0, 0.1, math.inf, True),
        (2.0, math.nan, 0.1, math.inf, False),  # the batch itself is at fault
        (9.0, 5.0, 0.1, 4.0, False),
    ],
)
def test_whether_weights_are_worse_on_a_batch(
    now: float, then: float, least: float, sane: float, expected: bool
) -> None:
    """Clearly worse, on a batch that good weights can be judged by."""
    assert worse(Comparison(now, then), least, sane=sane) is expected


def test_what_comes_out_of_nothing_is_not_the_learners() -> None:
    """In a calm run the learner is not blamed; soon after a restore, in a climb or at the beginning it is."""
    assert not learner_did_it(CALM, LIMITS)
    for sign in ({"climbing": True}, {"rate_rose": True}, {"healthy_since_restore": 20}, {"healthy_steps": 3}):
        assert learner_did_it(dataclasses.replace(CALM, **sign), LIMITS)  # type: ignore[arg-type]
    assert not learner_did_it(dataclasses.replace(CALM, healthy_since_restore=30, undo=True), LIMITS)


def test_a_rate_rises_since_the_snapshot_or_before() -> None:
    """Half as much again as the lowest rate so far is a rise."""
    assert rate_rises(dataclasses.replace(CALM, lowest_lr=0.05), LIMITS)
    assert not rate_rises(dataclasses.replace(CALM, lowest_lr=0.08), LIMITS)
