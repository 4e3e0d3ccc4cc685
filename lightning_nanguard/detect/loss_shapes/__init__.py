"""The shapes of a diverging loss: one file each, pure functions of the loss history.

To add one, write a function like those here in a file of its own, and list it in :data:`LOSS_SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lightning_nanguard.detect.loss_shapes.collapsed import collapsed
from lightning_nanguard.detect.loss_shapes.exploding import exploding
from lightning_nanguard.detect.loss_shapes.stuck import stuck
from lightning_nanguard.detect.loss_shapes.unsteady import unsteady
from lightning_nanguard.detect.loss_shapes.view import LossView
from lightning_nanguard.thresholds.detection import DivergingLossThresholds
from lightning_nanguard.types import Fault

LossShape = Callable[[LossView, DivergingLossThresholds], Fault | None]
"""Judges a loss history; returns its fault, ``None`` where the loss has another shape."""

LOSS_SHAPES: Mapping[str, LossShape] = MappingProxyType(
    {
        "exploding_loss": exploding,
        "collapsed": collapsed,
        "unsteady_loss": unsteady,
        "stuck_loss": stuck,
    }
)
"""The shapes by the kind of their fault, in the order they are judged; one that was dismissed is left out for a while.

``overshoot`` is not listed: it is judged by a rise some readings ago, however low the loss is now.
"""
