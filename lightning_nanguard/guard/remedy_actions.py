"""What remedies may do to a run: put the learner back, slow it, clip it, try rates out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.distributed.ranks import Ranks
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.rehearsal import Rehearsal, Stage
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot


@final
class RemedyActions:
    """Does what remedies ask for; a :class:`~lightning_nanguard.remedies.RunControl`.

    Args:
        learner: What is trained.
        ring: The snapshots.
        standing: Where the run stands.
        recovery: Cuts the rate and clips.
        rehearsal: Tries rates out.
        stage: The loop around.
        blocker: Keeps updates from the weights.
        ranks: All processes.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        standing: GuardState,
        recovery: Recovery,
        rehearsal: Rehearsal,
        stage: Stage,
        blocker: StepSkipper,
        ranks: Ranks,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._standing = standing
        self._recovery = recovery
        self._rehearsal = rehearsal
        self._stage = stage
        self._blocker = blocker
        self._ranks = ranks
        self._undo: Callable[[], None]
        self._forget: Callable[[Snapshot], None]

    def begin(self, undo: Callable[[], None], forget: Callable[[Snapshot], None]) -> None:
        """An intervention begins.

        Args:
            undo: Puts back what its batch touched.
            forget: Called with a snapshot gone back to: what was read of later states is of no use any more.
        """
        self._undo, self._forget, self._standing.restored = undo, forget, None

    def skip(self) -> None:
        """Undo what the batch touched."""
        self._undo()

    def restore(self, depth: int) -> None:
        """Go back to a certified snapshot; to what the fit began with where nothing was certified yet."""
        if self._ring.certified:
            self._ring.drop_pending()
            snapshot = self._ranks.whole(self._ring.discard_newer(depth))
        elif self._ring.pending is not None:
            snapshot = self._ring.pending
        else:
            return
        self._standing.restored = snapshot
        restore(self._learner, snapshot)
        self._standing.healthy_since_restore = 0
        self._forget(snapshot)
        for optimizer in self._learner.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        """Multiply the learning rate, or with ``limit`` allow no larger one than results."""
        self._recovery.scale(factor, min_lr, limit=limit)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip from now on; ``inf`` ends it."""
        self._recovery.clip(value, algorithm)

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""
        for optimizer in self._learner.optimizers:
            optimizer.state.clear()

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Try a rate out from the state just gone back to."""
        if self._standing.restored is None:
            return None
        self._blocker.skipped.clear()  # the faulty update is over, and rehearsed ones must be made
        loss = self._rehearsal.loss_after(self._standing.restored, factor, updates)
        return None if loss is None else loss / self._rehearsal.loss_unit()

    def rehearsal_batches(self) -> int:
        """How many batches there are to rehearse on."""
        return self._stage.rehearsal_batches()
