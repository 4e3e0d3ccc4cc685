"""One history for each optimizer: its detectors, and the trend of its losses and norms."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_nanguard.detectors import Detector, NonFinite, check
from lightning_nanguard.events import Fault, Reading
from lightning_nanguard.trend import Trend

# Steps in a row far off after which one that wanders has left: of 240 healthy LBFGS runs one came back after 46.
_COMES_BACK = 60


@final
class Streams:
    """Detectors and trends by the index of the optimizer.

    Args:
        prototypes: Detectors, of which each optimizer gets copies of its own with its first reading.
    """

    def __init__(self, prototypes: Sequence[Detector]) -> None:
        self._prototypes = tuple(prototypes)
        self._detectors: dict[int, list[Detector]] = {}
        self._trends: dict[int, Trend] = {}

    def detectors(self, stream: int) -> list[Detector]:
        """The detectors of an optimizer; from now on it is known."""
        if stream not in self._detectors:
            self._detectors[stream] = [copy.deepcopy(detector) for detector in self._prototypes]
            self._trends[stream] = Trend()
        return self._detectors[stream]

    def check(self, reading: Reading, *, trial: bool = False, wanders: bool = False) -> Fault | None:
        """What the detectors of its optimizer find in a reading; from now on that optimizer is known.

        Args:
            reading: What was measured.
            trial: Whether it is of a place that the optimizer only tries.
            wanders: Whether the optimizer goes far off and comes back by itself, as LBFGS does on mini-batches: a
                finite spike is then the batch's only where that is strange too, and a loss far off is one that stays.
        """
        detectors = self.detectors(reading.stream)
        if trial:
            return check([detector for detector in detectors if isinstance(detector, NonFinite)], reading)
        fault = check(detectors, reading)
        if fault is None or not wanders:
            return fault
        if fault.kind == "gradient_spike":
            return replace(fault, doubtful=True)
        far_off = self._trends[reading.stream].far_off()
        returns = far_off > 0 or fault.kind == "unsteady_loss"
        return None if fault.scope == "learner" and returns and far_off < _COMES_BACK else fault

    def trend(self, stream: int) -> Trend | None:
        """History of an optimizer's losses and norms, ``None`` before its first reading."""
        return self._trends.get(stream)

    def accept(self, reading: Reading) -> None:
        """Take a reading into the history of its optimizer, which is known."""
        for detector in self._detectors[reading.stream]:
            detector.accept(reading)
        self._trends[reading.stream].accept(reading)

    def dismiss(self, reading: Reading) -> bool:
        """The fault seen in a reading was none.

        Returns:
            Whether its optimizer is known.
        """
        for detector in self._detectors.get(reading.stream, ()):
            detector.dismiss(reading)
        return reading.stream in self._detectors

    def rewind(self, step: int) -> None:
        """Forget what came after update ``step``."""
        for stream, detectors in self._detectors.items():
            self._trends[stream].rewind(step)
            for detector in detectors:
                detector.rewind(step)

    def uneasy(self, readings: Sequence[Reading]) -> bool:
        """Whether a detector is uneasy about one of some readings."""
        return any(detector.uneasy(r) for r in readings for detector in self._detectors[r.stream])

    def learning(self) -> bool:
        """Whether all losses are falling, or have fallen and stayed there."""
        return all(trend.learning() for trend in self._trends.values())

    def scale(self) -> float:
        """The largest scale of a loss."""
        return max((trend.scale() for trend in self._trends.values()), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            str(stream): {
                "trend": self._trends[stream].state_dict(),
                "detectors": [[type(detector).__qualname__, detector.state_dict()] for detector in detectors],
            }
            for stream, detectors in self._detectors.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for stream, saved in state.items():
            trend = self._trends[int(stream)] = Trend()
            trend.load_state_dict(saved["trend"])
            detectors = self._detectors[int(stream)] = [copy.deepcopy(detector) for detector in self._prototypes]
            _take_histories_up(detectors, saved["detectors"])


def _take_histories_up(detectors: Sequence[Detector], saved: Sequence[Sequence[Any]]) -> None:
    """The n-th detector of a class takes up the history of the n-th of that class: the list around may have changed."""
    histories: dict[str, deque[Any]] = {}
    for name, history in saved:
        histories.setdefault(name, deque()).append(history)
    for detector in detectors:
        own = histories.get(type(detector).__qualname__)
        if own:
            detector.load_state_dict(own.popleft())
