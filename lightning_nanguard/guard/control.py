"""Finds out whether branches of a run make the same updates as the run itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lightning_nanguard.guard.branch import Branch, Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.snapshot import Snapshot

NOT_ALIKE = (
    "a copy of the model does not make the updates of the run: code outside of the optimizer's step changes weights or "
    "gradients, or the step depends on what the copy lacks"
)
"""Why no branch is compared with the run."""


@dataclass(frozen=True, slots=True)
class OutsideMove:
    """How far code outside of the optimizer's step moved the weights in one update.

    Attributes:
        ratio: That distance, divided by the distance of the optimizer's step.
        parameters: Names of the parameters that it moved, the farthest first.
    """

    ratio: float
    parameters: tuple[str, ...]


@final
class Control:
    """A copy of the run that makes each of the next updates a second time, to be compared with the run itself.

    Code outside of the optimizer's step may change weights or gradients: a callback that clips weights, a projection
    in ``optimizer_step``, noise on gradients. A branch is trained without it, so its losses say nothing about the run.
    The same is true if the step depends on something else that is not part of the learner. Then the control is not
    where the run is after the update, and the guard compares no branches with this run.

    Args:
        context: Objects and settings that the parts of the guard share.
        branches: Trains the control.

    Attributes:
        failed: Whether the control has once not been where the run was.
        outside: How far code outside of the step moved the weights; ``None`` while the control has not failed.
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
        self.outside: OutsideMove | None = None

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
        if self.failed:
            ratio, *parameters = max(context.ranks.gather(self._outside(branch.state, start)))
            self.outside = OutsideMove(ratio, tuple(parameters))
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
        return self._distance(made, target) <= self._limits.alike * self._distance(target, start)

    def _outside(self, made: Snapshot, start: Snapshot) -> list[Any]:
        """The fields of :class:`OutsideMove` in a list, which ranks can exchange."""
        stepped = self._distance(made, start)
        if self._target is None or stepped == 0:
            return [0.0]
        apart = self._distances(made, self._target)
        moved = sorted(((far, name) for name, far in apart.items() if far > 0), reverse=True)
        # Code outside of the step is meant to move the weights that no optimizer trains, as those of a teacher. What it
        # moves explains why the trained weights differ.
        trained = {key[1] for key, leaf in self._context.learner.weights() if leaf.requires_grad}
        if any(name not in trained for _, name in moved):
            return [0.0]
        return [math.hypot(*(far for far, _ in moved)) / stepped, *(name for _, name in moved)]

    def _distance(self, one: Snapshot, other: Snapshot) -> float:
        return math.hypot(*self._distances(one, other).values())

    def _distances(self, one: Snapshot, other: Snapshot) -> dict[str, float]:
        """How far apart two states are in each parameter that the step uses. An averaged copy does not count."""
        trace = self._context.replay.step_trace()
        unused = frozenset() if trace is None else trace.unused
        apart = {
            key[1]: leaf - then
            for key, leaf in one.leaves.items()
            if key[0] == "parameter" and key[1] not in unused and isinstance(leaf, Tensor)
            if isinstance(then := other.leaves.get(key), Tensor)
        }
        # One list, so that the device is read once.
        return dict(zip(apart, norms(list(apart.values())), strict=True))
