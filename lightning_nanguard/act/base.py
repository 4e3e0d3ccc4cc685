"""The base class of remedies, and the actions on a run that a remedy may call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol

from lightning_nanguard.types import (
    Clip,
    DropMoments,
    Evidence,
    Fault,
    PlanStep,
    Restore,
    RestoreAverages,
    RestoreScale,
    Role,
    Scale,
    Skip,
    Stop,
)


class RunControl(Protocol):
    """The actions on a run that a remedy may call."""

    def skip(self) -> None:
        """Undo what the batch changed. Its update was not made."""

    def restore(self, depth: int) -> None:
        """Restore the learner from a certified snapshot: ``depth`` 0 is the newest, 1 the one before it."""

    def restore_averages(self) -> None:
        """Restore averaged copies of the weights that are bad, and nothing else."""

    def restore_scale(self) -> None:
        """Restore the scale of the GradScaler, and nothing else."""

    def scale(self, factor: float, min_lr: float, *, limit: bool = False, tried: bool = False) -> None:
        """Multiply the learning rate. With ``limit`` the result becomes the largest allowed rate.

        With ``tried``, a trial has found the factor, so the rate is not lowered further by a review.
        """

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients from now on; ``inf`` ends it."""

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Mean loss of the newest batches after ``updates`` on them, at the learning rate times ``factor``.

        The loss is in loss units, and infinite if it diverged. The learner is restored afterwards. ``None`` if no batch
        can be run again.
        """

    def rate_factor_of_restored(self) -> float:
        """The rate at which the restored state was taken, divided by the present one; 1 if one of them is not known.

        It is 0.1 if that state was taken at a rate of 0.001 and the rate is 0.01 now.
        """


_ROLES: dict[type[PlanStep], Role] = {
    Skip: "skip",
    Restore: "restore",
    RestoreAverages: "restore",
    RestoreScale: "restore",
    Scale: "rate",
    Clip: "clip",
    DropMoments: "moments",
    Stop: "stop",
}


class Remedy(ABC):
    """Proposes and carries out one kind of action after a fault, such as a rollback. Subclass it to write your own.

    A remedy proposes one immutable plan step and later carries it out with a :class:`RunControl`. A run is changed in
    no other way. An example::

        from dataclasses import dataclass
        from lightning_nanguard import PlanStep, Remedy

        @dataclass(frozen=True)
        class Page(PlanStep):
            text: str

        class PageSomebody(Remedy):
            word, step = "page", Page

            def propose(self, fault, evidence, attempt):
                return Page(fault.message)

            def apply(self, step, run):
                send(step.text)

    The guard calls every listed remedy whose role the verdict needs. ``"notify"`` is called at every fault,
    ``"restore"`` if the learner or its state is bad, and ``"rate"``, ``"clip"`` and ``"moments"`` if the learner
    diverged.
    """

    word: ClassVar[str]
    """Name of the remedy in the records (``Intervention.remedies``)."""

    step: ClassVar[type[PlanStep]]
    """Class of the plan step that it proposes and carries out. Each remedy has its own class."""

    @property
    def role(self) -> Role:
        """The role of the remedy. It follows from the class of its step. Your own class has the role ``"notify"``."""
        return next((role for kind, role in _ROLES.items() if issubclass(self.step, kind)), "notify")

    @abstractmethod
    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Return the plan step for this fault, or ``None`` if the remedy does not apply. It changes nothing.

        Args:
            fault: The fault that was found.
            evidence: The evidence about it.
            attempt: 0 at first, one more each time the fault came back soon.
        """

    @abstractmethod
    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Carry out a step that this remedy proposed."""
