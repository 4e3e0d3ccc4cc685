"""Finds mistakes that cause neither NaN nor an exception, with one pure function for each.

A function takes an :class:`~lightning_nanguard.diagnosis.mistakes.observation.Observation` of the first updates. It
returns a :class:`~lightning_nanguard.Finding`, or ``None`` if nothing is wrong or a deviation is intended.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_nanguard.diagnosis.mistakes.data_repeats import data_repeats
from lightning_nanguard.diagnosis.mistakes.detached_part import detached_part
from lightning_nanguard.diagnosis.mistakes.dropout_off import dropout_off
from lightning_nanguard.diagnosis.mistakes.eval_mode import eval_mode
from lightning_nanguard.diagnosis.mistakes.frozen_part import frozen_part
from lightning_nanguard.diagnosis.mistakes.gradient_not_zeroed import gradient_not_zeroed
from lightning_nanguard.diagnosis.mistakes.learning_rate_zero import learning_rate_zero
from lightning_nanguard.diagnosis.mistakes.loss_without_graph import loss_without_graph
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.diagnosis.mistakes.parameter_not_in_optimizer import parameter_not_in_optimizer
from lightning_nanguard.diagnosis.mistakes.parameter_without_gradient import parameter_without_gradient
from lightning_nanguard.diagnosis.mistakes.schedule_ended import schedule_ended
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

MISTAKES: tuple[Callable[[Observation, DiagnosisThresholds], Finding | None], ...] = (
    loss_without_graph,
    parameter_not_in_optimizer,
    detached_part,
    parameter_without_gradient,
    frozen_part,
    gradient_not_zeroed,
    eval_mode,
    dropout_off,
    learning_rate_zero,
    schedule_ended,
    data_repeats,
)
"""Every mistake that is looked for in the first updates."""


def mistakes(seen: Observation, thresholds: DiagnosisThresholds = DEFAULT) -> tuple[Finding, ...]:
    """Mistakes that the first updates show, those with the highest confidence first."""
    found = [finding for mistake in MISTAKES if (finding := mistake(seen, thresholds)) is not None]
    return tuple(sorted(found, key=lambda finding: -finding.confidence))
