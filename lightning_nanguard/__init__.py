"""Keep PyTorch Lightning runs alive through NaN and divergence.

Example:
    >>> from lightning_nanguard import NaNGuard                     # doctest: +SKIP
    >>> trainer = Trainer(callbacks=[NaNGuard()])                   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nanguard.callback import NaNGuard
    from lightning_nanguard.detectors import Detector, DivergingLoss, GradientSpike, NonFinite
    from lightning_nanguard.errors import BadCheckpointError, TrainingDivergedError
    from lightning_nanguard.events import Advice, Fault, Finding, Intervention, Reading
    from lightning_nanguard.policy import Budget
    from lightning_nanguard.remedies import (
        ClipGradients,
        ReduceLR,
        Remedy,
        ResetMoments,
        Rollback,
        SkipStep,
        StopTraining,
    )

__version__ = "0.1.0"

# Resolved on first use, so that the parts that need no torch can be imported without it.
_HOMES = {
    "NaNGuard": "callback",
    "Detector": "detectors",
    "DivergingLoss": "detectors",
    "GradientSpike": "detectors",
    "NonFinite": "detectors",
    "BadCheckpointError": "errors",
    "TrainingDivergedError": "errors",
    "Advice": "events",
    "Fault": "events",
    "Finding": "events",
    "Intervention": "events",
    "Reading": "events",
    "Budget": "policy",
    "ClipGradients": "remedies",
    "ReduceLR": "remedies",
    "Remedy": "remedies",
    "ResetMoments": "remedies",
    "Rollback": "remedies",
    "SkipStep": "remedies",
    "StopTraining": "remedies",
}

__all__ = [
    "Advice",
    "BadCheckpointError",
    "Budget",
    "ClipGradients",
    "Detector",
    "DivergingLoss",
    "Fault",
    "Finding",
    "GradientSpike",
    "Intervention",
    "NaNGuard",
    "NonFinite",
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
