"""Runs the detectors of one optimizer, so that an exception in one of them does not end the run."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, final

from lightning_nanguard.detect.base import Detector, Limits
from lightning_nanguard.errors import DetectorTypeError
from lightning_nanguard.types import Fault, Reading

_logger = logging.getLogger("lightning_nanguard")

# No reading is below these limits.
LOOK_AT_EACH = Limits(-math.inf, -math.inf)


@final
class DetectorGroup:
    """Runs the detectors of one optimizer, in their order.

    A detector that raises an exception is skipped in this call. The exception is logged the first time.

    Args:
        detectors: The detectors; they belong to this group alone.
        logged: Names of the detectors whose exception has been logged; shared among the groups of one run.
    """

    def __init__(self, detectors: Sequence[Detector], logged: set[str]) -> None:
        self._detectors = tuple(detectors)
        self._line_search = tuple(detector for detector in detectors if detector.judges_line_search)
        self._logged = logged

    def find(self, reading: Reading, *, line_search: bool = False) -> Fault | None:
        """The first fault that a detector finds in a reading, ``None`` if none does.

        Args:
            reading: The reading.
            line_search: Whether it comes from a further evaluation of one step. Then only detectors with
                ``judges_line_search`` check it.

        Raises:
            TypeError: If a detector returns anything but a fault or ``None``.
        """
        for detector in self._line_search if line_search else self._detectors:
            fault = self._ask(detector, "check", None, reading)
            if fault is not None:
                if not isinstance(fault, Fault):
                    raise _wrong_type(detector, "check", fault, "a Fault, or None where the reading has none")
                return fault
        return None

    def at_end(self) -> list[Fault]:
        """The faults that the detectors find in the newest readings when a fit ends."""
        found = [self._ask(detector, "at_end", None) for detector in self._detectors]
        return [fault for fault in found if isinstance(fault, Fault)]

    def accept(self, readings: Sequence[Reading]) -> None:
        """Add healthy readings to the histories."""
        for detector in self._detectors:
            for reading in readings:
                self._ask(detector, "accept", None, reading)

    def rewind(self, step: int) -> None:
        """Forget the readings accepted after ``step``."""
        for detector in self._detectors:
            self._ask(detector, "rewind", None, step)

    def dismiss(self, reading: Reading) -> None:
        """Tell all detectors that the fault found in a reading was a false alarm."""
        for detector in self._detectors:
            self._ask(detector, "dismiss", None, reading)

    def uneasy(self, reading: Reading) -> bool:
        """Whether a detector is uneasy about a reading."""
        return any(self._ask(detector, "uneasy", False, reading) for detector in self._detectors)

    def limits(self) -> Limits:
        """Loss and gradient norm below which no detector finds a fault in the next readings.

        Raises:
            TypeError: If a detector returns anything but limits or ``None``.
        """
        limits = [self._limits(detector) for detector in self._detectors]
        return Limits(
            min([one.loss for one in limits], default=math.inf), min([one.norm for one in limits], default=math.inf)
        )

    def _limits(self, detector: Detector) -> Limits:
        limits = self._ask(detector, "limits", None)
        if limits is not None and not isinstance(limits, Limits):
            raise _wrong_type(detector, "limits", limits, "Limits, or None to be asked about each reading")
        return LOOK_AT_EACH if limits is None else limits

    def state(self) -> list[list[Any]]:
        """Class name and history of each detector, in plain containers."""
        return [[_name(one), self._ask(one, "state_dict", {})] for one in self._detectors]

    def load(self, saved: Sequence[Sequence[Any]]) -> None:
        """Load saved histories.

        The n-th detector of a class takes the n-th saved history of that class, because the list may have changed.
        """
        histories: dict[str, deque[Any]] = {}
        for name, history in saved:
            histories.setdefault(name, deque()).append(history)
        for detector in self._detectors:
            own = histories.get(_name(detector))
            if own:
                self._ask(detector, "load_state_dict", None, own.popleft())

    def _ask(self, detector: Detector, method: str, otherwise: Any, *args: Any) -> Any:
        """The result of a method of a detector; ``otherwise`` if it raises an exception."""
        try:
            return getattr(detector, method)(*args)
        except Exception as error:
            self._log(detector, method, error)
            return otherwise

    def _log(self, detector: Detector, method: str, error: Exception) -> None:
        name = f"{type(detector).__module__}.{_name(detector)}"
        if name in self._logged:
            return
        self._logged.add(name)
        _logger.warning(
            "NaNGuard: %s() of the detector %s raised %s: %s. Training goes on without this call, and the next calls "
            "are made as usual. Further exceptions of this detector are not shown.",
            method,
            name,
            type(error).__name__,
            error,
            exc_info=error,
        )


def _name(detector: Detector) -> str:
    return type(detector).__qualname__


def _wrong_type(detector: Detector, method: str, returned: object, expected: str) -> DetectorTypeError:
    return DetectorTypeError(
        f"{method}() of the detector {type(detector).__module__}.{_name(detector)} returned {returned!r}, "
        f"a {type(returned).__name__}. Return {expected}."
    )
