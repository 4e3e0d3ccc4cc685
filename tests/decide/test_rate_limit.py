"""A learning-rate cut respects the rate a finding allows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_nanguard.decide.rate_limit import spare_rate, within_curvature
from lightning_nanguard.types import Clip, Comparison, Evidence, Finding, Restore, Scale


@pytest.mark.parametrize(
    ("evidence", "lr", "most"),
    [
        ({"largest_rate": 0.02}, 0.5, 0.04),
        ({"largest_rate": 0.9}, 0.5, math.inf),
        ({"largest_rate": 0.02}, None, math.inf),
        ({}, 0.5, math.inf),
    ],
)
def test_a_finding_bounds_the_cut(evidence: dict[str, float | str], lr: float | None, most: float) -> None:
    """Where the finding knows the largest rate the loss allows, the plan's cut ends there at most; the rest stays."""
    plan = (Restore(0), Clip(2.0), Scale(0.5))
    finding = Finding("learning_rate_too_high", 0.9, evidence)
    assert within_curvature(plan, finding, lr) == (Restore(0), Clip(2.0), Scale(0.5, most=most))
    steepest = Finding("ill_conditioned", 0.9, evidence)
    firm = most < math.inf
    assert within_curvature(plan, steepest, lr) == (Restore(0), Clip(2.0), Scale(0.5, most=most, firm=firm))
    assert within_curvature(plan, None, lr) == plan


@pytest.mark.parametrize(
    ("finding", "known", "cut"),
    [
        (Finding("log_of_zero", 0.85, scope="batch"), {}, False),
        (Finding("log_of_zero", 0.85, scope="batch"), {"comparison": Comparison(math.inf, math.inf)}, False),
        (Finding("log_of_zero", 0.85, scope="batch"), {"comparison": Comparison(math.inf, 0.4)}, True),
        (
            Finding("log_of_zero", 0.85, scope="batch"),
            {"comparison": Comparison(math.inf, 0.4, holds_elsewhere=True)},
            False,
        ),
        (Finding("log_of_zero", 0.85, scope="batch"), {"climbing": True}, True),
        (Finding("log_of_zero", 0.85, scope="batch"), {"rate_rose": True}, True),
        (Finding("learning_rate_too_high", 0.9, scope="learner"), {}, True),
        (None, {}, True),
    ],
)
def test_a_rate_that_is_not_to_blame_is_not_cut(finding: Finding | None, known: dict[str, Any], cut: bool) -> None:
    """A finding that blames the batch spares the rate, unless good weights do better on all batches or the losses were
    climbing."""
    plan = (Restore(0), Clip(2.0), Scale(0.5))
    assert spare_rate(plan, finding, Evidence(step=9, **known)) == (plan if cut else plan[:2])
    assert spare_rate((Scale(2.0),), finding, Evidence(step=9, **known)) == (Scale(2.0),)
