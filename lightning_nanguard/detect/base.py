"""The base class of detectors, and what the guard asks of one.

A detector of your own is one class with a :meth:`Detector.check`::

    class LossAbove(Detector):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def check(self, reading):
            if reading.loss is not None and reading.loss > self.limit:
                return Fault("loss_above", "batch", "loss", reading.loss, f"the loss is above {self.limit}")
            return None
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning_nanguard.types import Fault, Reading

AT_ONCE = 16
"""How many healthy readings are accepted at once, at most."""


class Limits(NamedTuple):
    """A finite reading below both is no fault.

    Attributes:
        loss: Which the loss has to be below.
        norm: Which the gradient norm must not be above.
    """

    loss: float
    norm: float


class Detector(ABC):
    """Looks at the readings of one optimizer and says what is wrong with the newest, if anything is.

    The engine copies every configured detector for each optimizer, so an instance sees one history only.
    """

    @abstractmethod
    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``. Must not change the detector's history."""

    def accept(self, reading: Reading) -> None:  # noqa: B027
        """Take a reading that no detector objected to into the history."""

    def rewind(self, step: int) -> None:  # noqa: B027
        """Forget what was accepted after ``step``: the learner went back to it."""

    def dismiss(self, reading: Reading) -> None:  # noqa: B027
        """Your suspicion about this reading was looked into and was none; stay quiet about it for a while."""

    def uneasy(self, reading: Reading) -> bool:
        """Whether a state should not be certified on this reading, though it is no fault."""
        return False

    def undecided(self) -> bool:
        """Whether something is still to be looked into, and no state is to be certified until then."""
        return False

    def limits(self) -> Limits | None:
        """Below what the next :data:`AT_ONCE` readings are no fault, ``None`` where each has to be looked at.

        Readings below the limits of all detectors are accepted some at a time, which is cheaper.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """The inverse of :meth:`state_dict`."""


def check(detectors: Iterable[Detector], reading: Reading) -> Fault | None:
    """The first fault that one of some detectors finds in a reading, ``None`` where none does."""
    for detector in detectors:
        fault = detector.check(reading)
        if fault is not None:
            return fault
    return None
