"""A learning-rate cut respects the rate a finding allows."""

from __future__ import annotations

import math

import pytest

from lightning_nanguard.decide.rate_limit import within_curvature
from lightning_nanguard.types import Clip, Finding, Restore, Scale


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
