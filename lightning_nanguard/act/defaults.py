"""The remedies used if the user lists none, and which remedy carries out which step."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.act.reset_moments import ResetMoments
from lightning_nanguard.act.rollback import AverageRollback, Rollback, ScaleRollback
from lightning_nanguard.act.skip_step import SkipStep
from lightning_nanguard.act.stop_training import StopTraining
from lightning_nanguard.thresholds.rate_search import CutThresholds
from lightning_nanguard.types import PlanStep


def default_remedies(thresholds: CutThresholds | None = None) -> tuple[Remedy, ...]:
    """The remedies of ``NaNGuard(remedies=None)``."""
    return (Rollback(), ClipGradients(), ReduceLR(thresholds=thresholds))


def executors(remedies: Sequence[Remedy]) -> dict[type[PlanStep], Remedy]:
    """The remedy for each class of plan step: the user's own if listed, else a default one for steps always allowed.

    Raises:
        ValueError: If two remedies have the same class of plan step.
    """
    listed: dict[type[PlanStep], Remedy] = {}
    for remedy in remedies:
        if remedy.step in listed:
            raise ValueError(
                f"remedies: {type(remedy).__name__} and {type(listed[remedy.step]).__name__} both carry out "
                f"{remedy.step.__name__}; list one of them."
            )
        listed[remedy.step] = remedy
    always: tuple[Remedy, ...] = (
        SkipStep(),
        Rollback(),
        AverageRollback(),
        ScaleRollback(),
        ReduceLR(),
        ClipGradients(),
        ResetMoments(),
        StopTraining(),
    )
    return {remedy.step: remedy for remedy in always} | listed
