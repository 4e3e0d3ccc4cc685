"""Finds out whether branches of a run make the same updates as the run itself."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from lightning_nanguard.guard.branch import Branch, Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.snapshot import Snapshot

NOT_ALIKE = "code outside of the optimizer's step changes weights or gradients, which a copy of the model lacks"
"""Why no branch is compared with the run."""


@final
class Control:
    """A copy of the run that makes each of the next updates a second time, to be compared with the run itself.

    Code outside of the optimizer's step may change weights or gradients: a callback that clips weights, a projection
    in ``optimizer_step``, noise on gradients. A branch is trained without it, so its losses say nothing about the run.
    Then the control is not where the run is after the update, and the guard compares no branches with this run.

    Args:
        context: Objects and settings that the parts of the guard share.
        branches: Trains the control.

    Attributes:
        failed: Whether the control has once not been where the run was.
    """

    def __init__(self, context: GuardContext, branches: Branches) -> None:
        self._context = context
        self._branches = branches
        self._limits = context.thresholds.trial
        self._start: Snapshot | None = None
        self._branch: Branch | None = None
        # The state of the run after the update that the control makes.
        self._target: Snapshot | None = None
        self._seen = self._left = 0
        self.failed = False

    def begin(self) -> None:
        """Make the control anew with the next update."""
        self.release()
        self._left = self._limits.picked_after

    def release(self) -> None:
        """Free the memory of its copies."""
        self._start = self._branch = self._target = None

    def follow(self, step: int) -> bool:
        """Follow the run by an update; return whether the control was where the run was. Call it inside ``beside``.

        Args:
            step: Number of the update whose batch is at hand. Late readings bring batches of earlier updates.
        """
        context, branches = self._context, self._branches
        now, branch, start = context.state.step, self._branch, self._start
        if self.failed or self._left == 0 or now == self._seen:
            return not self.failed
        self._seen, self._left = now, self._left - 1
        # The run itself is elsewhere after a rollback or a cut of the rate.
        moved = context.state.healthy_since_restore == 1 or (
            branch is not None and branch.rate != context.rate.state_dict()
        )
        if branch is None or start is None or moved or step > start.step + 1:
            return self._start_here()
        if now == start.step + 1:
            made = branches.of(branches.present)
            self._target = None if made is None else made.state
        if step <= start.step:
            return True
        if branches.train(branch) is None:
            return False
        self.failed = not all(context.ranks.gather(self._is_alike(branch.state, start)))
        # Each update begins where the run is, because rounding grows at a rate that is far too high.
        return not self.failed and self._start_here()

    def _start_here(self) -> bool:
        self.release()
        if self._left == 0:
            return True
        begun = self._branches.of(self._branches.present)  # restores the learner to the present state
        self._start, self._branch = None if begun is None else begun.state, self._branches.of()
        return self._start is not None and self._branch is not None

    def _is_alike(self, made: Snapshot, start: Snapshot) -> bool:
        target = self._target
        if target is None:
            return True  # not known
        return _distance(made, target) <= self._limits.alike * _distance(target, start)


def _distance(one: Snapshot, other: Snapshot) -> float:
    pairs = [(leaf, other.leaves.get(key)) for key, leaf in one.leaves.items() if key[0] == "parameter"]
    # One list, so that the device is read once.
    return math.hypot(*norms([a - b for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]))
