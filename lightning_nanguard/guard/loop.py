"""The methods of the guard that a training loop calls, and the methods of the loop that the guard calls.

A loop calls the guard in this order::

    guard.start()
    for batch in data:
        guard.open_batch()          # before the batch changes anything
        guard.see_loss(loss)        # for every backward pass
        guard.before_step(0)        # gradients are there, unscaled and unclipped; optimizer 0 steps next
        guard.close_batch()         # after the optimizer and the schedulers
    guard.end_epoch()               # if a batch may have been opened but not run
    guard.finish()
    guard.close()

With gradient accumulation ``open_batch`` and ``see_loss`` are called for each micro-batch, and ``before_step`` once
for each window. The guard calls the methods of :class:`TrainingLoop`. If batches can be run again, it also uses the
:class:`BatchReplay` of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.diagnosis.step_tracer import StepTrace
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Evidence, Fault, Finding, Intervention, Reading

Clock = tuple[int, int, int]
"""``global_step``, epoch and batch index."""


class BatchReplay:
    """Examines batches and runs them again, without side effects.

    The methods of this class say that no batch can be examined or run again. A loop that can do so overrides those that
    it can answer.

    Attributes:
        redo: Makes the updates since a snapshot again after a rollback, and returns whether it could. Its arguments are
            the snapshot and the reading of the bad update, if one was made. ``None`` if the loop cannot do this.
    """

    redo: Callable[[Snapshot, Reading | None], bool] | None = None

    def comparable(self) -> bool:
        """Whether a batch can be run again at all."""
        return False

    def showing(self, update: int) -> AbstractContextManager[bool]:
        """Context in which the batch of an earlier update is the present one; gives whether it is still stored."""
        return nullcontext(False)

    def batch_finite(self) -> bool | None:
        """Whether the present batch is finite; ``None`` if it has no floating-point numbers or is missing."""
        return None

    def batch_strange(self, *, extreme: bool = False) -> bool | None:
        """Whether the present batch holds much larger numbers than earlier ones; ``None`` if that is not known.

        Args:
            extreme: Whether to ask for far larger numbers.
        """
        return None

    def probe(self, *, redrawn: bool = False) -> float | None:
        """Loss of the present batch under the present weights.

        Args:
            redrawn: Whether to draw other random numbers than the step did.
        """
        return None

    def gradient_finite(self) -> bool | None:
        """Whether the present batch has a finite gradient under the present weights; removes the gradients."""
        return None

    def rehearsal_batches(self) -> int:
        """Number of recent batches on which learning rates can be tried."""
        return 0

    def rehearsing(self) -> AbstractContextManager[None]:
        """Context in which batches run without being counted; at its end everything but the learner is restored."""
        return nullcontext()

    def train_on(self, index: int) -> float | None:
        """Make one plain update on a recent batch; return its loss before the update."""
        return None

    def loss_on(self, index: int) -> float | None:
        """Loss of a recent batch under the present weights."""
        return None

    def step_trace(self) -> StepTrace | None:
        """What was found when a step was traced; ``None`` if no batch can be run again. The first call runs one."""
        return None

    def earlier(self) -> Sequence[Callable[[], float | None]]:
        """For each of some recent batches, a function that gives its loss under the weights of the call.

        The functions still work when newer batches have come.
        """
        return ()

    def trainable(self) -> bool:
        """Whether everything that the present update is made from is stored, so that another state can make it too."""
        return False

    def train_at_hand(self) -> float | None:
        """Make the present update again from the present state, with its random numbers; return the loss before it."""
        return None

    def loss_at_hand(self) -> float | None:
        """Loss of the present update under the present state, with its random numbers. Inside ``rehearsing``."""
        return None

    def sizes_vary(self, updates: int) -> bool:
        """Whether the batches of the newest updates differ in their number of samples, or are not stored."""
        return True

    def bytes_kept(self) -> int:
        """Bytes of the batches that are stored to be run again."""
        return 0


class TrainingLoop(Protocol):
    """What the guard needs from the loop that calls it."""

    def clock(self) -> Clock:
        """The present ``global_step``, epoch and batch index."""

    def updates_left(self) -> float:
        """Number of updates that the run will still make; ``math.inf`` if that is not known."""

    def micro_batches(self) -> int:
        """Number of micro-batches by which the loss given to ``backward`` is divided."""

    def record(self, intervention: Intervention) -> None:
        """Store the record of an intervention."""

    def advise(self, finding: Finding, clock: Clock | None = None) -> None:
        """Report a suspicion that the guard does not act on, with its clock; ``None`` for the present one."""

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Find the cause of a fault; ``None`` if none was found. It changes nothing."""
