"""The base class of remedies, and what a remedy may do to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol

from lightning_nanguard.types import Evidence, Fault, PlanStep


class RunControl(Protocol):
    """What a remedy may do to a run."""

    def skip(self) -> None:
        """Undo what the batch touched; the update itself was kept from the weights."""

    def restore(self, depth: int) -> None:
        """Put the learner back to the certified snapshot ``depth`` places behind the newest."""

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        """Multiply the learning rate, or with ``limit`` allow no larger one than results."""

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients from now on; ``inf`` ends it."""

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Mean loss of the newest batches after ``updates`` on them with the learning rate multiplied by ``factor``.

        In units of the loss's own scale, the untrained model's loss or its noise. Infinite where the loss left on the
        way; the learner is left as it was. ``None`` where that cannot be done.
        """

    def rehearsal_batches(self) -> int:
        """How many batches there are to rehearse on."""


class Remedy(ABC):
    """One thing the guard may do."""

    word: ClassVar[str]
    """How the records call it."""

    step: ClassVar[type[PlanStep]]
    """The kind of plan step it proposes and carries out."""

    @abstractmethod
    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """What to do about this fault, ``None`` when the remedy does not fit. Pure.

        Args:
            fault: What was found.
            evidence: What is known about it.
            attempt: 0 at first, one more each time the trouble came back soon.
        """

    @abstractmethod
    def apply(self, step: PlanStep, patient: RunControl) -> None:
        """Carry out a step that this remedy proposed."""
