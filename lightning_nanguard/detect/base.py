"""The base class of detectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from lightning_nanguard.types import Fault, Reading

AT_ONCE = 16
"""Most healthy readings that are accepted at once. :meth:`Detector.limits` has to hold for that many readings."""


class Limits(NamedTuple):
    """Limits of a detector: a finite reading with a loss and a gradient norm below them is no fault.

    Attributes:
        loss: The loss has to be below it; ``math.inf`` if the loss does not matter.
        norm: The gradient norm must not be above it; ``math.inf`` if the norm does not matter.
    """

    loss: float
    norm: float


class Detector(ABC):
    """Finds faults in the readings of one optimizer. Subclass it to write your own detector.

    Only :meth:`check` is required. In every update the guard does this:

    1. It measures the loss and the gradient norm of the update: a :class:`~lightning_nanguard.Reading`.
    2. It calls :meth:`check` of the detectors in their order. The first fault counts.
    3. Without a fault, it calls :meth:`accept` of each detector with the reading, up to 16 readings later.
    4. With a fault, it collects evidence. If this confirms the fault, the guard acts. If it goes back to an earlier
       state, it calls :meth:`rewind`. If the fault is not confirmed, it calls :meth:`dismiss` and may accept the
       reading after all.

    The guard copies each detector once per optimizer, with ``copy.deepcopy``, so an instance gets the readings of one
    optimizer only. A detector must be deterministic, because with several processes each of them uses its own copy.

    If a detector raises an exception, the guard logs it once and goes on without that detector for this reading. If
    :meth:`check` returns anything but a fault or ``None``, the run ends with a ``TypeError``.

    Example:
        A detector that stores the newest losses. A loss of ten times their mean is a fault of the batch:

        >>> from lightning_nanguard import Detector, Fault, Reading, Window
        >>> class LossJump(Detector):
        ...     def __init__(self, factor: float = 10.0) -> None:
        ...         self.factor = factor
        ...         self.losses = Window(50)
        ...
        ...     def check(self, reading: Reading) -> Fault | None:
        ...         losses = self.losses.values()
        ...         if reading.loss is None or len(losses) < 20:
        ...             return None
        ...         usual = sum(losses) / len(losses)
        ...         if reading.loss <= self.factor * usual:
        ...             return None
        ...         message = f"the loss is {reading.loss:.4g}, its mean {usual:.4g}"
        ...         return Fault("loss_jump", "batch", "loss", reading.loss, message, certain=False)
        ...
        ...     def accept(self, reading: Reading) -> None:
        ...         if reading.loss is not None:
        ...             self.losses.append(reading.step, reading.loss)
        ...
        ...     def rewind(self, step: int) -> None:
        ...         self.losses.rewind(step)
        >>> detector = LossJump()
        >>> for step in range(20):
        ...     detector.accept(Reading(step, 0, loss=1.0, grad_norm=1.0))
        >>> detector.check(Reading(20, 0, loss=50.0, grad_norm=1.0)).message
        'the loss is 50, its mean 1'

        It is given to the guard with ``NaNGuard(detectors=[NonFinite(), LossJump()])``.
    """

    judges_line_search: ClassVar[bool] = False
    """Whether it checks the further evaluations of one step, too.

    A line search, such as that of LBFGS, evaluates losses at bad places on purpose. Set it to ``True`` for faults that
    must not be there even then. These readings are never accepted.
    """

    @abstractmethod
    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, ``None`` if there is none.

        It must not change the detector's history, because the guard may call it twice with the same reading.

        Args:
            reading: The reading of one update.
        """

    def accept(self, reading: Reading) -> None:  # noqa: B027
        """Add a healthy reading to the history.

        Args:
            reading: A reading in which no detector found a fault, or whose fault was not confirmed.
        """

    def rewind(self, step: int) -> None:  # noqa: B027
        """Forget every reading accepted after ``step``: the guard has restored the state from after that update.

        Args:
            step: A :attr:`Reading.step <lightning_nanguard.Reading.step>`. It never goes back, so readings that come
                later have higher ones than those forgotten.
        """

    def dismiss(self, reading: Reading) -> None:  # noqa: B027
        """Report no fault like the one of this reading for a while, because it was not confirmed.

        It is called for every detector. A detector can call its own :meth:`check` to find out whether it found the
        fault. If it reports the fault again and again, the guard collects evidence each time, which takes time.

        Args:
            reading: The reading with the fault.
        """

    def uneasy(self, reading: Reading) -> bool:
        """Whether this reading is no fault, but the state of the model may be bad.

        The guard does not certify a snapshot with such a reading; it waits for the next one.

        Args:
            reading: A healthy reading.
        """
        return False

    def at_end(self) -> Fault | None:
        """The fault of the newest readings when a fit ends, for a detector that does not judge every reading.

        Nothing is done about it. The user is told, as with other faults that are not certain.
        """
        return None

    def limits(self) -> Limits | None:
        """Loss and gradient norm below which none of the next :data:`AT_ONCE` readings is a fault.

        The guard does not call :meth:`check` for readings below the limits of all detectors, which makes a healthy
        update cheaper. With ``None``, the default, it calls :meth:`check` for each reading.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the history from a checkpoint.

        Args:
            state: The result of :meth:`state_dict`.
        """
