"""Finds hyperparameters of an optimizer with which its updates grow by themselves, at any loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.optim import SGD, AdamW, Optimizer

from lightning_nanguard.thresholds.diagnosis import DEFAULT, LearnerThresholds
from lightning_nanguard.types import Evidence

_START = Evidence(0)


def unstable_setting(
    optimizers: Iterable[Optimizer], thresholds: LearnerThresholds = DEFAULT.learner, evidence: Evidence = _START
) -> str:
    """The first hyperparameter with which an optimizer diverges whatever the gradients are, in words; ``""`` if none.

    * With a momentum of 1 or more, the sum of past gradients never decays.
    * SGD and AdamW multiply each weight by ``1 - lr * weight_decay`` in every update. Above ``lr * weight_decay = 2``
      this is below −1, so the weights grow and change their sign each time. A negative weight decay makes it larger
      than 1. That is named if a weight matrix has grown, and the decay alone explains as much in the updates so far.
    * The decay is named only if it is farther from a usual one than the rate is. Otherwise the rate is at fault.

    Args:
        optimizers: The optimizers.
        thresholds: What is usual, and which growth counts.
        evidence: The number of updates so far, the growth of the weights, and the multiplier of the rate.

    Example:
        >>> import torch
        >>> unstable_setting([torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=1.1)])
        'the momentum is 1.1: the optimizer adds up all past gradients, and never forgets one. Use a momentum below 1'
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            momentum, rate, decay = (_number(group, key) for key in ("momentum", "lr", "weight_decay"))
            if momentum >= 1.0:
                return (
                    f"the momentum is {momentum:.4g}: the optimizer adds up all past gradients, and never forgets one. "
                    "Use a momentum below 1"
                )
            usual_rate, usual_decay = thresholds.usual_adamw if isinstance(optimizer, AdamW) else thresholds.usual_sgd
            decay_is_odd = abs(decay) / usual_decay > rate / usual_rate
            if not isinstance(optimizer, (SGD, AdamW)) or not decay_is_odd:
                continue
            if rate * decay > 2.0:
                return (
                    f"the weight decay is {decay:.4g}: at a learning rate of {rate:.4g} it multiplies each weight by "
                    f"{1 - rate * decay:.4g} in every update. Use a weight decay far below {1 / rate:.4g}"
                )
            if grows := _growth_by_decay(rate * evidence.multiplier, decay, momentum, thresholds, evidence):
                return grows
    return ""


def _growth_by_decay(
    rate: float, decay: float, momentum: float, thresholds: LearnerThresholds, evidence: Evidence
) -> str:
    """How a negative weight decay makes weights grow, in words; ``""`` if they did not grow by it."""
    if decay >= 0.0:
        return ""
    # With momentum, those of the updates before add up.
    times = 1 - rate * decay / (1 - momentum)
    explained = evidence.step * math.log(times)
    if min(math.log(max(evidence.growth, 1.0)), explained) <= math.log(thresholds.grown):
        return ""
    return (
        f"the weight decay is {decay:.4g}: a negative one makes weights grow, at a learning rate of {rate:.4g} to "
        f"{'about ' if momentum else ''}{times:.4g} times their size in every update. Use a positive one, or 0"
    )


def _number(group: dict[str, Any], key: str) -> float:
    value = group.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
