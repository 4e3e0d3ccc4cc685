"""Observations of the mistakes' tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_nanguard import Finding
from lightning_nanguard.diagnosis.mistakes.observation import ModeSeen, Observation, ParameterSeen, RateSeen
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds

BODY = ParameterSeen("body.0.weight")
BIAS = ParameterSeen("body.0.bias")
HEAD = ParameterSeen("head.weight")
WELL = Observation(
    64,
    parameters=(BODY, BIAS, HEAD),
    modes=(
        ModeSeen("body.1", "BatchNorm1d", False, True, "body.1"),
        ModeSeen("body.2", "Dropout", True, True, "body.2"),
    ),
    rates=(RateSeen(0, 0, 0.1, 0.1),),
    losses=64,
    batches=8,
    distinct=8,
)
"""A run in which nothing is wrong."""


def body(**what: Any) -> Observation:
    """The same run with another body."""
    return replace(WELL, parameters=(replace(BODY, **what), replace(BIAS, **what), HEAD))


def said(mistake: Callable[[Observation, DiagnosisThresholds], Finding | None], seen: Observation) -> str | None:
    """The place that is named, ``None`` where nothing is said."""
    finding = mistake(seen, DEFAULT)
    assert finding is None or (finding.cause == mistake.__name__ and finding.suggestion.endswith("."))
    return None if finding is None else finding.place
