"""Keep PyTorch Lightning runs alive through NaN and divergence.

Example:
    >>> from lightning_nanguard import NaNGuard                     # doctest: +SKIP
    >>> trainer = Trainer(callbacks=[NaNGuard()])                   # doctest: +SKIP
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nanguard.act.base import Remedy, RunControl
    from lightning_nanguard.act.clip_gradients import ClipGradients
    from lightning_nanguard.act.reduce_lr import ReduceLR
    from lightning_nanguard.act.reset_moments import ResetMoments
    from lightning_nanguard.act.rollback import Rollback
    from lightning_nanguard.act.skip_step import SkipStep
    from lightning_nanguard.act.stop_training import StopTraining
    from lightning_nanguard.callback import NaNGuard
    from lightning_nanguard.decide.budget import Budget
    from lightning_nanguard.detect.base import Detector, Limits
    from lightning_nanguard.detect.diverging_loss import DivergingLoss
    from lightning_nanguard.detect.gradient_spike import GradientSpike
    from lightning_nanguard.detect.non_finite import NonFinite
    from lightning_nanguard.detect.window import Window
    from lightning_nanguard.diagnosis.case import (
        NO_FAULT,
        BadField,
        Case,
        Change,
        Clues,
        Curvature,
        EarlierFinding,
        GradientCheck,
        LabelRelation,
        Layer,
        Model,
        Objective,
        Origin,
        Range,
    )
    from lightning_nanguard.diagnosis.course import Course
    from lightning_nanguard.errors import BadCheckpointError, TrainingDivergedError
    from lightning_nanguard.measure.sample_parts import sample_hash
    from lightning_nanguard.record.base import RunInfo, Sink
    from lightning_nanguard.record.receipts import Receipt
    from lightning_nanguard.record.wandb_alert import WandbAlert
    from lightning_nanguard.record.webhook import Webhook
    from lightning_nanguard.thresholds import Thresholds
    from lightning_nanguard.types import Advice, Comparison, Evidence, Fault, Finding, Intervention, PlanStep, Reading

__version__ = "0.2.0.dev0"

# Resolved on first use, so that the parts that need no torch can be imported without it.
_HOMES = {
    "Advice": "types",
    "BadCheckpointError": "errors",
    "BadField": "diagnosis.case",
    "Budget": "decide.budget",
    "Case": "diagnosis.case",
    "Change": "diagnosis.case",
    "ClipGradients": "act.clip_gradients",
    "Clues": "diagnosis.case",
    "Comparison": "types",
    "Course": "diagnosis.course",
    "Curvature": "diagnosis.case",
    "EarlierFinding": "diagnosis.case",
    "Detector": "detect.base",
    "DivergingLoss": "detect.diverging_loss",
    "Evidence": "types",
    "Fault": "types",
    "Finding": "types",
    "GradientCheck": "diagnosis.case",
    "GradientSpike": "detect.gradient_spike",
    "Intervention": "types",
    "LabelRelation": "diagnosis.case",
    "Layer": "diagnosis.case",
    "Limits": "detect.base",
    "Model": "diagnosis.case",
    "NO_FAULT": "diagnosis.case",
    "NaNGuard": "callback",
    "NonFinite": "detect.non_finite",
    "Objective": "diagnosis.case",
    "Origin": "diagnosis.case",
    "PlanStep": "types",
    "Range": "diagnosis.case",
    "Reading": "types",
    "Receipt": "record.receipts",
    "ReduceLR": "act.reduce_lr",
    "Remedy": "act.base",
    "ResetMoments": "act.reset_moments",
    "Rollback": "act.rollback",
    "RunControl": "act.base",
    "RunInfo": "record.base",
    "Sink": "record.base",
    "SkipStep": "act.skip_step",
    "StopTraining": "act.stop_training",
    "Thresholds": "thresholds",
    "TrainingDivergedError": "errors",
    "WandbAlert": "record.wandb_alert",
    "Webhook": "record.webhook",
    "Window": "detect.window",
    "sample_hash": "measure.sample_parts",
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
    "EarlierFinding",
    "Evidence",
    "Fault",
    "Finding",
    "GradientCheck",
    "GradientSpike",
    "Intervention",
    "LabelRelation",
    "Layer",
    "Limits",
    "Model",
    "NaNGuard",
    "NonFinite",
    "Objective",
    "Origin",
    "PlanStep",
    "Range",
    "Reading",
    "Receipt",
    "ReduceLR",
    "Remedy",
    "ResetMoments",
    "Rollback",
    "RunControl",
    "RunInfo",
    "Sink",
    "SkipStep",
    "StopTraining",
    "Thresholds",
    "TrainingDivergedError",
    "WandbAlert",
    "Webhook",
    "Window",
    "__version__",
    "sample_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        close = get_close_matches(name, __all__, n=1)
        meant = f". Did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
