"""What a training loop tells the guard, and what the guard may ask of the loop.

A loop calls the guard in this order::

    guard.start()
    for batch in data:
        guard.open_batch()          # before the batch changes anything
        guard.see_loss(loss)        # for every backward pass
        guard.before_step(0)        # gradients are there, unscaled and unclipped; optimizer 0 steps next
        guard.close_batch()         # after the optimizer and the schedulers
    guard.end_epoch()               # where a batch may be left without having been run
    guard.finish()
    guard.close()

With gradient accumulation ``open_batch`` and ``see_loss`` are called for each micro-batch, ``before_step`` once a
window. The guard calls the methods of :class:`TrainingLoop`. If batches can be run again, it also uses the loop's
:class:`BatchReplay`. A loop that cannot do this provides :class:`NoReplay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.types import Evidence, Fault, Finding, Intervention

Clock = tuple[int, int, int]
"""``global_step``, epoch and batch index."""


class BatchReplay(Protocol):
    """Examines batches and runs them again, without side effects. ``None`` means that this is not possible.

    Without an implementation of its own each method answers so.
    """

    def comparable(self) -> bool:
        """Whether a batch can be run again at all."""
        return False

    def showing(self, update: int) -> AbstractContextManager[bool]:
        """Inside, the present batch is that of an earlier update; gives whether it is still there."""
        return nullcontext(False)

    def batch_finite(self) -> bool | None:
        """Whether the present batch is finite; ``None`` if it holds no floating numbers or is not there."""
        return None

    def batch_strange(self, *, extreme: bool = False) -> bool | None:
        """Whether the present batch reaches far beyond those before it; ``None`` if that is not known.

        Args:
            extreme: Whether to ask if it is far larger than them.
        """
        return None

    def probe(self) -> float | None:
        """Loss of the present batch under the present weights."""
        return None

    def gradient_finite(self) -> bool | None:
        """Whether the present batch has a finite gradient under the present weights; gradients are gone afterwards."""
        return None

    def rehearsal_batches(self) -> int:
        """How many recent batches there are to try learning rates on."""
        return 0

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside, batches run outside the run's count; at its end all they touched but the learner is restored."""
        return nullcontext()

    def train_on(self, index: int) -> float | None:
        """Make one plain update on a recent batch; gives its loss before the update."""
        return None

    def loss_on(self, index: int) -> float | None:
        """Loss of a recent batch under the present weights."""
        return None

    def earlier(self) -> Sequence[Callable[[], float | None]]:
        """For some recent batches each what gives its loss under the weights of then, also when others have come."""
        return ()

    def trainable(self) -> bool:
        """Whether all that the present update is made of is kept, so that another state can make the same update."""
        return False

    def train_at_hand(self) -> float | None:
        """Make the present update with the random numbers it had, from the present state; gives the loss before it."""
        return None

    def bytes_kept(self) -> int:
        """Bytes of the batches that are kept to be run again."""
        return 0


class NoReplay(BatchReplay):
    """The replay of a loop that cannot run batches again. Subclass it for a loop that can do some of it."""


class TrainingLoop(Protocol):
    """What the guard needs from the loop that calls it."""

    def clock(self) -> Clock:
        """The present ``global_step``, epoch and batch index."""

    def micro_batches(self) -> int:
        """By how many micro-batches the loss given to ``backward`` is divided."""

    def record(self, intervention: Intervention) -> None:
        """Store the record of an intervention."""

    def advise(self, finding: Finding) -> None:
        """Report a suspicion that the guard does not act on."""

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Find the cause of a fault, ``None`` if none was found. It changes nothing."""
