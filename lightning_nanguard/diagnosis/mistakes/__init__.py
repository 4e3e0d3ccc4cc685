"""Finds mistakes that cause neither NaN nor an exception, with one pure function for each.

A function takes an :class:`~lightning_nanguard.diagnosis.mistakes.observation.Observation` of the first updates. It
returns a :class:`~lightning_nanguard.Finding`, or ``None`` if nothing is wrong or a deviation is intended.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_nanguard.diagnosis.mistakes import parts, steps
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

MISTAKES: tuple[Callable[[Observation, DiagnosisThresholds], Finding | None], ...] = (
    steps.loss_without_graph,
    parts.parameter_not_in_optimizer,
    parts.detached_part,
    parts.parameter_without_gradient,
    parts.frozen_part,
    steps.gradient_not_zeroed,
    parts.eval_mode,
    parts.dropout_off,
    steps.learning_rate_zero,
    steps.data_repeats,
)
"""Every mistake that the first updates show. Whether a schedule has ended (`steps`), only later updates show."""


def mistakes(seen: Observation, thresholds: DiagnosisThresholds = DEFAULT) -> tuple[Finding, ...]:
    """Mistakes that the first updates show, those with the highest confidence first."""
    found = [finding for mistake in MISTAKES if (finding := mistake(seen, thresholds)) is not None]
    return tuple(sorted(found, key=lambda finding: -finding.confidence))
