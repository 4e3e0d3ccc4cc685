"""The base class of sinks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_nanguard.types import Intervention


class Sink(ABC):
    """Something that keeps or shows interventions.

    Example:
        >>> class Beep(Sink):
        ...     def write(self, intervention):
        ...         print("beep", intervention.fault)
        ...
        ...     def close(self):
        ...         pass
        >>> SinkDispatcher([Beep()]).write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        beep non_finite_loss
    """

    @abstractmethod
    def write(self, intervention: Intervention) -> None:
        """Take one record. Training goes on only after this returns."""

    @abstractmethod
    def close(self) -> None:
        """Called at the end of every fit. More records may follow: the same guard may serve another fit."""
