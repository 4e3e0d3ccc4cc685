"""The steps of a plan: what is to be done about a fault."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ActOn = Literal["certain", "evidence"]
"""For what the guard changes a run: only for what is certain, or also for finite suspicions that evidence confirms."""

Role = Literal["skip", "restore", "rate", "clip", "moments", "notify", "stop"]
"""What a remedy is for. The policy asks a remedy whenever its verdict on a fault calls for this role."""


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One action of a plan. Subclass it for the action of your own remedy."""


@dataclass(frozen=True, slots=True)
class Skip(PlanStep):
    """Leave the update out, and undo what its batch changed (such as running statistics)."""


@dataclass(frozen=True, slots=True)
class Restore(PlanStep):
    """Go back to a certified snapshot; ``depth`` 0 is the newest."""

    depth: int = 0


@dataclass(frozen=True, slots=True)
class RestoreAverages(PlanStep):
    """Restore averaged copies of the weights that are bad, and nothing else."""


@dataclass(frozen=True, slots=True)
class RestoreScale(PlanStep):
    """Restore the scale of the GradScaler, and nothing else."""


@dataclass(frozen=True, slots=True)
class Scale(PlanStep):
    """Multiply the learning rate by ``factor``; the product never falls below ``min_lr``.

    Attributes:
        factor: The factor that is planned. A remedy that tries rates may choose another one.
        min_lr: Lowest learning rate that may result.
        limit: True if the resulting rate becomes an upper limit: the schedule has just raised the rate, and is followed
            again when it falls below the limit.
        most: Largest factor at which the loss still falls, computed from its curvature. It bounds the factor if no
            rates can be tried.
        firm: True if ``most`` bounds the factor even if rates are tried.
        tried: True if a trial has found the factor, so that no rate has to be tried.
        clipped: True if the plan also clips gradients, so that the rate may stay if clipping suffices.
    """

    factor: float
    min_lr: float = 0.0
    limit: bool = False
    most: float = math.inf
    firm: bool = False
    tried: bool = False
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Clip(PlanStep):
    """Clip gradients from now on."""

    value: float
    algorithm: Literal["norm", "value"] = "norm"


@dataclass(frozen=True, slots=True)
class DropMoments(PlanStep):
    """Empty the optimizer's state, as in a new optimizer."""


@dataclass(frozen=True, slots=True)
class Stop(PlanStep):
    """End the run with a :class:`~lightning_nanguard.TrainingDivergedError`.

    Attributes:
        reason: Why the run cannot go on.
        limit: The argument of :class:`~lightning_nanguard.Budget` that allows no more; empty if no limit is reached.
    """

    reason: str
    limit: str = ""


Plan = tuple[PlanStep, ...]
