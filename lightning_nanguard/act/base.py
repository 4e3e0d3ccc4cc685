"""The base class of remedies, and what a remedy may do to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol

from lightning_nanguard.types import Clip, DropMoments, Evidence, Fault, PlanStep, Restore, Role, Scale, Skip, Stop


class RunControl(Protocol):
    """What a remedy may do to a run."""

    def skip(self) -> None:
        """Undo what the batch changed; its update was not made."""

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

        In loss units. Infinite where the loss diverged on the way; the learner is left as it was. ``None`` where that
        cannot be done.
        """

    def rehearsal_batches(self) -> int:
        """Number of batches that :meth:`rehearse` can use."""


_ROLES: dict[type[PlanStep], Role] = {
    Skip: "skip",
    Restore: "restore",
    Scale: "rate",
    Clip: "clip",
    DropMoments: "moments",
    Stop: "stop",
}


class Remedy(ABC):
    """One thing the guard may do to a run, or tell somebody, when a fault was found.

    A remedy proposes one frozen plan step and later carries it out on a :class:`RunControl`. Nothing else changes a
    run. A remedy of your own is one class::

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

    The guard asks every listed remedy whose role the verdict calls for. A remedy never prevents another from being
    asked. ``"notify"`` is asked at every fault, ``"restore"`` where the learner or its state is lost, and ``"rate"``,
    ``"clip"`` and ``"moments"`` where the learner diverged. Of these three roles the plan takes that of the first
    remedy that proposes something, and all of them where one role may not be enough.
    """

    word: ClassVar[str]
    """The word for it in the records (``Intervention.remedies``)."""

    step: ClassVar[type[PlanStep]]
    """The kind of plan step it proposes and carries out; each remedy has a kind of its own."""

    @property
    def role(self) -> Role:
        """What it is for, by the kind of its step; ``"notify"`` for a kind of your own."""
        return next((role for kind, role in _ROLES.items() if issubclass(self.step, kind)), "notify")

    @abstractmethod
    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """What to do about this fault, ``None`` when the remedy does not fit. It changes nothing.

        Args:
            fault: What was found.
            evidence: What is known about it.
            attempt: 0 at first, one more each time the trouble came back soon.
        """

    @abstractmethod
    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Carry out a step that this remedy proposed."""
