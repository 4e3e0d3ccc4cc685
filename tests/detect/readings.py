"""Readings, and detectors that are given runs of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_nanguard import Detector, Fault, Reading


def reading(step: int, loss: float | None = 1.0, norm: float | None = 1.0, **more: object) -> Reading:
    """A reading whose flags fit its numbers, unless ``more`` says otherwise."""
    loss_finite = loss is None or math.isfinite(loss)
    finite = loss_finite and (norm is None or math.isfinite(norm))
    return Reading(**{"step": step, "optimizer_index": 0, "loss": loss, "grad_norm": norm, "finite": finite,
                      "loss_finite": loss_finite, **more})  # fmt: skip


def watch(detector: Detector, losses: Iterable[float], norm: float = 1.0) -> list[tuple[int, str]]:
    """The faults in a run of losses; what is no fault is accepted, and so are rises, which the weights decide on."""
    faults = []
    for step, loss in enumerate(losses):
        one = reading(step, loss, norm)
        fault = detector.check(one)
        if fault is not None:
            faults.append((step, fault.kind))
        if fault is not None and fault.kind == "overshoot":
            detector.dismiss(one)
        if fault is None or fault.kind == "overshoot":
            detector.accept(one)
    return faults


def looked_into(detector: Detector, losses: Iterable[float], start: int = 0) -> list[tuple[int, Fault]]:
    """The faults in a run of losses of which each is looked into and is none."""
    faults = []
    for step, loss in enumerate(losses, start):
        one = reading(step, loss)
        fault = detector.check(one)
        if fault is not None:
            faults.append((step, fault))
            detector.dismiss(one)
        detector.accept(one)
    return faults


def learning_curve(step: int) -> float:
    """The loss of a run that learns."""
    return 2.3 * math.exp(-step / 60)
