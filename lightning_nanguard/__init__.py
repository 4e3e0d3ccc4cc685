"""Keep PyTorch Lightning runs alive through NaN and divergence.

Example:
    >>> from lightning_nanguard import NaNGuard                     # doctest: +SKIP
    >>> trainer = Trainer(callbacks=[NaNGuard()])                   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nanguard.act.base import Remedy
    from lightning_nanguard.act.clip_gradients import ClipGradients
    from lightning_nanguard.act.reduce_lr import ReduceLR
    from lightning_nanguard.act.reset_moments import ResetMoments
    from lightning_nanguard.act.rollback import Rollback
    from lightning_nanguard.act.skip_step import SkipStep
    from lightning_nanguard.act.stop_training import StopTraining
    from lightning_nanguard.callback import NaNGuard
    from lightning_nanguard.decide.budget import Budget
    from lightning_nanguard.detect.base import Detector
    from lightning_nanguard.detect.diverging_loss import DivergingLoss
    from lightning_nanguard.detect.gradient_spike import GradientSpike
    from lightning_nanguard.detect.non_finite import NonFinite
    from lightning_nanguard.diagnosis.case import (
        NO_FAULT,
        BadField,
        Case,
        Change,
        Clues,
        Course,
        Curvature,
        GradientCheck,
        Layer,
        Model,
        Objective,
        Origin,
        Range,
    )
    from lightning_nanguard.errors import BadCheckpointError, TrainingDivergedError
    from lightning_nanguard.types import Advice, Comparison, Evidence, Fault, Finding, Intervention, Reading

__version__ = "0.1.0"

# Resolved on first use, so that the parts that need no torch can be imported without it.
_HOMES = {
    "NaNGuard": "callback",
    "Detector": "detect.base",
    "DivergingLoss": "detect.diverging_loss",
    "GradientSpike": "detect.gradient_spike",
    "NonFinite": "detect.non_finite",
    "BadCheckpointError": "errors",
    "TrainingDivergedError": "errors",
    "Advice": "types",
    "Comparison": "types",
    "Evidence": "types",
    "BadField": "diagnosis.case",
    "Case": "diagnosis.case",
    "Change": "diagnosis.case",
    "Clues": "diagnosis.case",
    "Course": "diagnosis.case",
    "Curvature": "diagnosis.case",
    "GradientCheck": "diagnosis.case",
    "Layer": "diagnosis.case",
    "Model": "diagnosis.case",
    "NO_FAULT": "diagnosis.case",
    "Objective": "diagnosis.case",
    "Origin": "diagnosis.case",
    "Range": "diagnosis.case",
    "Fault": "types",
    "Finding": "types",
    "Intervention": "types",
    "Reading": "types",
    "Budget": "decide.budget",
    "ClipGradients": "act.clip_gradients",
    "ReduceLR": "act.reduce_lr",
    "Remedy": "act.base",
    "ResetMoments": "act.reset_moments",
    "Rollback": "act.rollback",
    "SkipStep": "act.skip_step",
    "StopTraining": "act.stop_training",
}

__all__ = [
    "NO_FAULT",
    "Advice",
    "BadCheckpointError",
    "BadField",
    "Budget",
    "Case",
    "Change",
    "ClipGradients",
    "Clues",
    "Comparison",
    "Course",
    "Curvature",
    "Detector",
    "DivergingLoss",
    "Evidence",
    "Fault",
    "Finding",
    "GradientCheck",
    "GradientSpike",
    "Intervention",
    "Layer",
    "Model",
    "NaNGuard",
    "NonFinite",
    "Objective",
    "Origin",
    "Range",
    "Reading",
    "ReduceLR",
    "Remedy",
    "ResetMoments",
    "Rollback",
    "SkipStep",
    "StopTraining",
    "TrainingDivergedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
