"""Keeping one update from the weights, whatever optimizer makes it."""

from __future__ import annotations

import math
from functools import partial
from typing import final

from torch.optim import LBFGS, Optimizer

from lightning_nanguard.learner import Learner, Path
from lightning_nanguard.snapshot import Snapshot, capture, restore


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes scaled gradients and a ``found_inf`` flag (the fused ones)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@final
class Blocker:
    """Blocks updates and puts back what an optimizer changes all the same.

    Without gradients most optimizers do nothing. LBFGS has by then changed its state and the weights, between the
    closures of the same step, and others count steps in their groups: for those a copy is kept.

    Args:
        learner: Whose updates.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._before: dict[int, Snapshot] = {}
        self.blocked: set[int] = set()

    def open(self) -> None:
        """A batch begins: copy what could not be put back later."""
        self.blocked.clear()
        for index, optimizer in enumerate(self._learner.optimizers):
            if isinstance(optimizer, LBFGS):
                leaves = [*self._learner.weights(), *self._learner.optimizer_leaves(index)]
                self._before[index] = capture(
                    self._learner, step=0, global_step=0, leaves=leaves, reuse=self._before.get(index)
                )

    def block(self, stream: int) -> None:
        """Keep the update that this optimizer is about to make from the weights."""
        optimizer = self._learner.optimizers[stream]
        self.blocked.add(stream)
        if stream not in self._before and not type(optimizer).__module__.startswith("torch.optim"):
            leaves = [*self._learner.optimizer_leaves(stream)]
            self._before[stream] = capture(self._learner, step=0, global_step=0, leaves=leaves)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._learner.scaler is not None and unscales_itself(optimizer):
            # This scaler insists on gradients, and skips the step by itself when it finds one that is not finite.
            if parameters and parameters[0].grad is not None:
                parameters[0].grad.fill_(math.inf)
            return
        for parameter in parameters:
            parameter.grad = None

    def undo(self) -> None:
        """Put back what the blocked optimizers changed without gradients."""
        for stream in self.blocked:
            before = self._before.get(stream)
            if before is None:
                continue
            restore(self._learner, before, keep=partial(_is_of, stream))
            if not isinstance(self._learner.optimizers[stream], LBFGS):
                del self._before[stream]


def _is_of(stream: int, path: Path) -> bool:
    return path[0] in ("parameter", "buffer") or (path[0] in ("optimizer", "group") and path[1] == stream)
