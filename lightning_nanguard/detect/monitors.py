"""Detectors and reading history of each optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector
from lightning_nanguard.detect.detector_group import LOOK_AT_EACH, DetectorGroup
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.thresholds.detection import DetectionThresholds
from lightning_nanguard.types import Fault, Reading


@final
class Monitor:
    """Watches one optimizer. Healthy readings are collected and passed on together, or when a caller needs them.

    Args:
        detectors: The detectors of this optimizer.
        history: The history of its readings.
    """

    def __init__(self, detectors: DetectorGroup, history: ReadingHistory) -> None:
        self._detectors = detectors
        self._history = history
        self._waiting: list[Reading] = []
        self._taken = 0
        self._loss, self._norm = LOOK_AT_EACH

    def is_calm(self, reading: Reading) -> bool:
        """Whether no detector needs to check a reading."""
        loss, norm = reading.loss, reading.grad_norm
        return reading.finite and (loss is None or loss < self._loss) and (norm is None or norm <= self._norm)

    def accept(self, reading: Reading) -> None:
        """Add a healthy reading."""
        self._waiting.append(reading)
        self._taken += 1
        # The count decides when limits are renewed, so that all ranks have the same limits.
        if self._taken % AT_ONCE == 0:
            self.up_to_date()
            self._loss, self._norm = self._detectors.limits()

    def up_to_date(self) -> tuple[DetectorGroup, ReadingHistory]:
        """The detectors and the history, after passing all collected readings on to them."""
        if self._waiting:
            self._detectors.accept(self._waiting)
            for reading in self._waiting:
                self._history.accept(reading)
            self._waiting.clear()
        return self._detectors, self._history

    def rewind(self, step: int, *, keep_first: bool) -> None:
        """Forget the readings after update ``step``. With ``keep_first``, keep the first reading in any case."""
        detectors, history = self.up_to_date()
        if keep_first and history.first_step is not None:
            step = max(step, history.first_step)
        history.rewind(step)
        detectors.rewind(step)
        self._taken = 0
        self._loss, self._norm = detectors.limits()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        detectors, history = self.up_to_date()
        return {
            "trend": history.state_dict(),
            "detectors": detectors.state(),
            "taken": self._taken,
            "limits": [self._loss, self._norm],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._history.load_state_dict(state["trend"])
        self._detectors.load(state["detectors"])
        # Checkpoints of version 0.1.0 lack these.
        self._taken = int(state.get("taken", 0))
        self._loss, self._norm = state.get("limits") or self._detectors.limits()


@final
class Monitors:
    """Watches every optimizer of a run, each with detectors and a history of its own.

    Args:
        prototypes: The detectors. Each optimizer gets its own copies at its first reading.
        thresholds: Thresholds of the histories. The detectors have their own.
    """

    def __init__(self, prototypes: Sequence[Detector], thresholds: DetectionThresholds = DetectionThresholds()) -> None:
        self._prototypes = tuple(prototypes)
        self._thresholds = thresholds
        self._monitors: dict[int, Monitor] = {}
        self._logged: set[str] = set()

    def _made(self, optimizer_index: int) -> Monitor:
        if optimizer_index not in self._monitors:
            detectors = DetectorGroup([copy.deepcopy(detector) for detector in self._prototypes], self._logged)
            self._monitors[optimizer_index] = Monitor(detectors, ReadingHistory(self._thresholds.history))
        return self._monitors[optimizer_index]

    def passes(self, reading: Reading) -> bool:
        """Accept the reading if it is below all limits; return whether it was accepted."""
        calm = self.calm(reading)
        if calm:
            self.accept(reading)
        return calm

    def calm(self, reading: Reading) -> bool:
        """Whether the reading is below all limits. It is not accepted."""
        monitor = self._monitors.get(reading.optimizer_index)
        return monitor is not None and monitor.is_calm(reading)

    def check(self, reading: Reading, *, line_search: bool = False, quasi_newton: bool = False) -> Fault | None:
        """The fault that the detectors of its optimizer find in a reading; the first call creates these detectors.

        Args:
            reading: The reading.
            line_search: Whether it comes from a further evaluation of one step, as in the line search of LBFGS, which
                evaluates losses at bad places on purpose.
            quasi_newton: Whether the loss may rise far and recover by itself, as with LBFGS on mini-batches.

        Raises:
            TypeError: If a detector returns anything but a fault or ``None``.
        """
        monitor = self._made(reading.optimizer_index)
        if monitor.is_calm(reading):
            return None
        detectors, _ = monitor.up_to_date()
        fault = detectors.find(reading, line_search=line_search)
        if fault is not None and quasi_newton and not line_search and fault.scope == "batch" and not fault.certain:
            # Such an optimizer may cause a spike by itself, so a spike is a fault only if its batch is strange, too.
            return replace(fault, doubtful=True)
        return fault

    def at_end(self) -> list[tuple[int, Fault]]:
        """The faults that the detectors find in the newest readings when a fit ends, with the optimizer's index."""
        return [(index, fault) for index, one in self._monitors.items() for fault in one.up_to_date()[0].at_end()]

    def history(self, optimizer_index: int) -> ReadingHistory:
        """History of an optimizer's losses and norms; an empty one before its first reading."""
        known = self._monitors.get(optimizer_index)
        return ReadingHistory(self._thresholds.history) if known is None else known.up_to_date()[1]

    def accept(self, reading: Reading) -> None:
        """Add a reading to the history of its optimizer. :meth:`check` must have been called for it before."""
        self._monitors[reading.optimizer_index].accept(reading)

    def dismiss(self, reading: Reading) -> bool:
        """Tell the detectors that the fault found in a reading was a false alarm.

        Returns:
            Whether the optimizer of the reading has detectors.
        """
        known = self._monitors.get(reading.optimizer_index)
        if known is not None:
            known.up_to_date()[0].dismiss(reading)
        return known is not None

    def rewind(self, step: int, *, keep_first: bool = False) -> None:
        """Forget the readings after update ``step``. With ``keep_first``, keep the first reading in any case."""
        for monitor in self._monitors.values():
            monitor.rewind(step, keep_first=keep_first)

    def uneasy(self, readings: Sequence[Reading]) -> bool:
        """Whether a detector is uneasy about one of the readings."""
        return any(self._monitors[reading.optimizer_index].up_to_date()[0].uneasy(reading) for reading in readings)

    def learning(self) -> bool:
        """Whether the loss of each optimizer is clearly below that of its first healthy update."""
        return all(monitor.up_to_date()[1].learning() for monitor in self._monitors.values())

    def loss_unit(self) -> float:
        """The largest loss unit of all optimizers."""
        return max((monitor.up_to_date()[1].loss_unit() for monitor in self._monitors.values()), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {str(index): monitor.state_dict() for index, monitor in self._monitors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._monitors.clear()
        for index, saved in state.items():
            self._made(int(index)).load_state_dict(saved)
