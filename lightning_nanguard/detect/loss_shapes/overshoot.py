"""An update took the loss far above the untrained model's some readings ago, whatever the loss is now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_nanguard.detect.loss_shapes.view import LossView, loss_unit
from lightning_nanguard.thresholds.detection import OvershootThresholds
from lightning_nanguard.types import Fault


@final
@dataclass(frozen=True, slots=True)
class Rise:
    """A loss that went far above the untrained model's, and has not been looked into.

    Attributes:
        step: Step of the last reading before it.
        height: The highest loss since.
        due: Number of losses accepted since the start or the last rollback at which the weights are looked at.
    """

    step: int
    height: float
    due: int


def rises(loss: float, first: float, thresholds: OvershootThresholds) -> bool:
    """Whether a loss is far above the untrained model's; never if that one is 0, which gives no unit to measure in."""
    return first != 0 and loss > first + thresholds.above * loss_unit(first)


def overshoot(view: LossView, rise: Rise) -> Fault | None:
    """The fault ``overshoot``, ``None`` while it is too early to look at the weights after a rise."""
    if view.since < rise.due:
        return None
    message = f"the loss rose to {rise.height:.4g} after step {rise.step}; the untrained model's was {view.first:.4g}"
    return Fault("overshoot", "learner", "loss", view.loss, message, since=rise.step, certain=False, proof="growth")
