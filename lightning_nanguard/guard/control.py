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
    """A branch of the present state, at the present rate, which makes some updates beside the run.

    Code outside of the optimizer's step may change weights or gradients: a callback that clips weights, a projection
    in ``optimizer_step``, noise on gradients. A branch is trained without it, so its losses say nothing about the run.
    Then the control is not where the run is after these updates, and the guard compares no branches with this run.

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
        self._left = 0
        self._step = 0
        self.failed = False

    def begin(self) -> None:
        """Make the control anew with the next update."""
        self._start = self._branch = None
        self._left = self._limits.controlled

    def follow(self, step: int) -> bool:
        """Make the present update; return whether the control is where the run is. Call it inside ``beside``.

        Args:
            step: Number of the update.
        """
        if self.failed or self._left == 0 or step == self._step:
            return not self.failed
        self._step, context = step, self._context
        moved = context.state.healthy_since_restore == 1 or (
            self._branch is not None and self._branch.rate != context.rate.state_dict()
        )
        if self._branch is None or moved:  # the run itself is elsewhere after a rollback or a cut of the rate
            return self._start_here()
        if self._branches.train(self._branch) is None:
            return False
        self._left -= 1
        self.failed = not all(context.ranks.gather(self._is_alike(self._branch)))
        if self.failed or self._left == 0:
            self._start = self._branch = None
        return not self.failed

    def _start_here(self) -> bool:
        begun, branch = self._branches.of(), self._branches.of()
        if begun is None or branch is None:
            return False
        self._start, self._branch = begun.state, branch
        return True

    def _is_alike(self, branch: Branch) -> bool:
        start, present = self._start, self._branches.present
        if start is None or present is None:
            return False
        moved = _distance(present, start)
        return _distance(branch.state, present) <= self._limits.alike * moved


def _distance(one: Snapshot, other: Snapshot) -> float:
    pairs = [(leaf, other.leaves.get(key)) for key, leaf in one.leaves.items() if key[0] == "parameter"]
    return math.hypot(*(norms([a - b])[0] for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)))
