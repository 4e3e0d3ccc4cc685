"""The base class of detectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from lightning_nanguard.types import Fault, Reading

AT_ONCE = 16
"""Most healthy readings that are accepted at once. :meth:`Detector.limits` has to hold for that many readings."""


class Limits(NamedTuple):
    """Bounds of what a detector never calls a fault: a finite reading with a loss and a gradient norm below them.

    Attributes:
        loss: The loss has to be below it; ``math.inf`` where the loss does not matter.
        norm: The gradient norm must not be above it; ``math.inf`` where the norm does not matter.
    """

    loss: float
    norm: float


class Detector(ABC):
    """Finds faults in the readings of one optimizer. Subclass it to bring a detector of your own.

    Only :meth:`check` is required. Every update goes like this:

    1. The guard measures the loss and the gradient norm of the update: a :class:`~lightning_nanguard.Reading`.
    2. It asks the detectors in their order to :meth:`check` the reading. The first fault counts.
    3. Without a fault, each detector gets the reading with :meth:`accept`, up to 16 readings later. A reading with a
       fault is not accepted.
    4. With a fault, the guard looks for evidence. If there is some, it acts, and when it goes back to an earlier state,
       it calls :meth:`rewind`. If there is none, it calls :meth:`dismiss` and may accept the reading after all.

    The guard copies each detector once per optimizer, with ``copy.deepcopy``, so an instance sees the readings of one
    optimizer only. A detector must be deterministic: with several processes each of them asks its own copy.

    A detector that raises an exception does not end the run: the guard logs it once and goes on without that detector
    for this reading. A :meth:`check` that returns anything but a fault or ``None`` does end it, with a ``TypeError``.

    Example:
        A detector that remembers the newest losses, and calls ten times their mean a fault of the batch:

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
        """The fault of this reading, ``None`` where there is none.

        It must not change the detector's history: the guard may ask it twice about the same reading.

        Args:
            reading: What was measured about one update.
        """

    def accept(self, reading: Reading) -> None:  # noqa: B027
        """Take a healthy reading into the history.

        Args:
            reading: A reading in which no detector found a fault, or whose fault proved to be none.
        """

    def rewind(self, step: int) -> None:  # noqa: B027
        """Forget every reading accepted after ``step``: the guard has restored the state from after that update.

        Args:
            step: A :attr:`Reading.step <lightning_nanguard.Reading.step>`. It never goes back, so readings that come
                later have higher ones than those forgotten.
        """

    def dismiss(self, reading: Reading) -> None:  # noqa: B027
        """Stay quiet for a while: there was no evidence for the fault found in this reading.

        Every detector is told, whichever found the fault; a detector can ask its own :meth:`check` whether it was its
        fault. If it goes on to report the fault, the guard looks into each report, which takes time.

        Args:
            reading: The reading with the fault.
        """

    def uneasy(self, reading: Reading) -> bool:
        """Whether this reading, though no fault, casts doubt on the state of the model.

        The guard does not certify a snapshot as good on such a reading; it waits for the next.

        Args:
            reading: A healthy reading.
        """
        return False

    def undecided(self) -> bool:
        """Whether the detector waits for further readings before it says that something is a fault.

        Until then a guard with one process certifies no snapshot as good; with several ranks it certifies all the same.
        """
        return False

    def limits(self) -> Limits | None:
        """Loss and gradient norm below which none of the next :data:`AT_ONCE` readings is a fault.

        The guard does not ask about readings below the limits of all detectors, which makes a healthy update cheaper.
        ``None``, the default, has it ask about each reading.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up the history of a checkpoint.

        Args:
            state: What :meth:`state_dict` returned.
        """
