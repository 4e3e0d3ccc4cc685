"""One history for each optimizer: its detectors, and the history of its losses and norms."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector, Limits, check
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.detect.non_finite import NonFinite
from lightning_nanguard.types import Fault, Reading

# Steps in a row far off after which one that wanders has left: of 240 healthy LBFGS runs one came back after 46.
_COMES_BACK = 60


# A reading that lies below these is below nothing.
_ALL = Limits(-math.inf, -math.inf)


@final
class Monitor:
    """What is known of one optimizer. Readings below all limits wait until there are some, or somebody asks."""

    def __init__(self, detectors: list[Detector]) -> None:
        self._detectors = detectors
        self._trend = ReadingHistory()
        self._waiting: list[Reading] = []
        self._taken = 0
        self._loss, self._norm = _ALL

    def is_calm(self, reading: Reading) -> bool:
        """Whether no detector needs to look at a reading."""
        loss, norm = reading.loss, reading.grad_norm
        return reading.finite and (loss is None or loss < self._loss) and (norm is None or norm <= self._norm)

    def accept(self, reading: Reading) -> None:
        """Take a healthy reading."""
        self._waiting.append(reading)
        self._taken += 1
        # Counted, so that all ranks have the same limits, whenever each of them was asked.
        if self._taken % AT_ONCE == 0:
            self.up_to_date()
            self._find_limits()

    def up_to_date(self) -> tuple[list[Detector], ReadingHistory]:
        """Detectors and history that have taken every reading."""
        if self._waiting:
            for reading in self._waiting:
                for detector in self._detectors:
                    detector.accept(reading)
                self._trend.accept(reading)
            self._waiting.clear()
        return self._detectors, self._trend

    def _find_limits(self) -> None:
        limits = [detector.limits() or _ALL for detector in self._detectors]
        self._loss = min([one.loss for one in limits], default=math.inf)
        self._norm = min([one.norm for one in limits], default=math.inf)

    def rewind(self, step: int) -> None:
        """Forget what came after update ``step``."""
        detectors, history = self.up_to_date()
        history.rewind(step)
        for detector in detectors:
            detector.rewind(step)
        self._taken = 0
        self._find_limits()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        detectors, history = self.up_to_date()
        histories = [[type(detector).__qualname__, detector.state_dict()] for detector in detectors]
        return {"trend": history.state_dict(), "detectors": histories}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._trend.load_state_dict(state["trend"])
        _take_histories_up(self._detectors, state["detectors"])
        self._find_limits()


@final
class Monitors:
    """Detectors and trends by the index of the optimizer.

    Args:
        prototypes: Detectors, of which each optimizer gets copies of its own with its first reading.
    """

    def __init__(self, prototypes: Sequence[Detector]) -> None:
        self._prototypes = tuple(prototypes)
        self._monitors: dict[int, Monitor] = {}

    def _made(self, optimizer_index: int) -> Monitor:
        if optimizer_index not in self._monitors:
            self._monitors[optimizer_index] = Monitor([copy.deepcopy(detector) for detector in self._prototypes])
        return self._monitors[optimizer_index]

    def passes(self, reading: Reading) -> bool:
        """Take a reading that no detector needs to look at; whether it is one."""
        monitor = self._monitors.get(reading.optimizer_index)
        if monitor is None or not monitor.is_calm(reading):
            return False
        monitor.accept(reading)
        return True

    def check(self, reading: Reading, *, trial: bool = False, wanders: bool = False) -> Fault | None:
        """What the detectors of its optimizer find in a reading; from now on that optimizer is known.

        Args:
            reading: What was measured.
            trial: Whether it is of a place that the optimizer only tries.
            wanders: Whether the optimizer goes far off and comes back by itself, as LBFGS does on mini-batches: a
                finite spike is then the batch's only where that is strange too, and a loss far off is one that stays.
        """
        monitor = self._made(reading.optimizer_index)
        if monitor.is_calm(reading):
            return None
        detectors, history = monitor.up_to_date()
        if trial:
            return check([detector for detector in detectors if isinstance(detector, NonFinite)], reading)
        fault = check(detectors, reading)
        if wanders and fault is not None and fault.since is not None:
            # It comes back from far off, and its weights with it.
            next(detector for detector in detectors if detector.check(reading) is not None).dismiss(reading)
            fault = check(detectors, reading)
        if fault is None or not wanders:
            return fault
        if fault.kind == "gradient_spike":
            return replace(fault, doubtful=True)
        far_off = history.far_off()
        returns = far_off > 0 or fault.kind == "unsteady_loss"
        return None if fault.scope == "learner" and returns and far_off < _COMES_BACK else fault

    def history(self, optimizer_index: int) -> ReadingHistory | None:
        """History of an optimizer's losses and norms, ``None`` before its first reading."""
        known = self._monitors.get(optimizer_index)
        return None if known is None else known.up_to_date()[1]

    def accept(self, reading: Reading) -> None:
        """Take a reading into the history of its optimizer, which is known."""
        self._monitors[reading.optimizer_index].accept(reading)

    def dismiss(self, reading: Reading) -> bool:
        """The fault seen in a reading was none.

        Returns:
            Whether its optimizer is known.
        """
        known = self._monitors.get(reading.optimizer_index)
        for detector in () if known is None else known.up_to_date()[0]:
            detector.dismiss(reading)
        return known is not None

    def rewind(self, step: int) -> None:
        """Forget what came after update ``step``."""
        for monitor in self._monitors.values():
            monitor.rewind(step)

    def uneasy(self, readings: Sequence[Reading]) -> bool:
        """Whether a detector is uneasy about one of some readings."""
        return any(
            detector.uneasy(r) for r in readings for detector in self._monitors[r.optimizer_index].up_to_date()[0]
        )

    def undecided(self) -> bool:
        """Whether a detector has still to look into something."""
        return any(detector.undecided() for monitor in self._monitors.values() for detector in monitor.up_to_date()[0])

    def learning(self) -> bool:
        """Whether all losses are falling, or have fallen and stayed there."""
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


def _take_histories_up(detectors: Sequence[Detector], saved: Sequence[Sequence[Any]]) -> None:
    """The n-th detector of a class takes up the history of the n-th of that class: the list around may have changed."""
    histories: dict[str, deque[Any]] = {}
    for name, history in saved:
        histories.setdefault(name, deque()).append(history)
    for detector in detectors:
        own = histories.get(type(detector).__qualname__)
        if own:
            detector.load_state_dict(own.popleft())
