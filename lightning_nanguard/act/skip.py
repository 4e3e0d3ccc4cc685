"""Keeping one update from the weights, whatever optimizer makes it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, final

from torch.optim import SGD, Optimizer

from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether a GradScaler leaves unscaling and skipping to the optimizer."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves a step out where a ``found_inf`` flag on the device says so (the fused ones)."""
    # The state of a run without fused steps, loaded into an optimizer with them, turns them off in the groups alone.
    return unscales_itself(optimizer) and all(group.get("fused", True) for group in optimizer.param_groups)


@final
class StepBlocker:
    """Blocks updates and puts back what an optimizer changes all the same.

    Gradients are taken away at the last moment (:meth:`hold_back`), behind clipping and the user's hooks, some of which
    fail without them. Torch's own optimizers then do nothing, but for LBFGS, which has by then changed its state and
    the weights between the closures of the same step. Others may count steps in their groups, or move weights all the
    same. For those a copy is kept.

    Args:
        learner: Whose updates.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._before: dict[int, Snapshot] = {}
        self._without_momentum: dict[int, tuple[tuple[int, int], list[Any]]] = {}
        self.blocked: set[int] = set()

    def open(self) -> None:
        """A batch begins: copy what could not be put back later."""
        self.blocked.clear()
        for index in self._learner.quasi_newton:
            self._keep(index)

    def block(self, optimizer_index: int) -> None:
        """Keep the update that this optimizer is about to make from the weights."""
        optimizer = self._learner.optimizers[optimizer_index]
        self.blocked.add(optimizer_index)
        if optimizer_index not in self._before and not type(optimizer).__module__.startswith("torch.optim"):
            self._keep(optimizer_index)
        if self._scaler_skips(optimizer):
            # This scaler insists on gradients, and skips the step by itself when it finds one that is not finite.
            gradient = next((p.grad for p in self._parameters(optimizer_index) if p.grad is not None), None)
            if gradient is not None:
                gradient.fill_(math.inf)

    def cannot_skip(self, optimizer_index: int) -> bool:
        """Whether the next update of an optimizer that skips on the device must not be left to that.

        Fused SGD makes the momentum of a parameter in its first step, and leaves the memory as it found it where that
        is skipped; the next step takes it for momentum.
        """
        optimizer = self._learner.optimizers[optimizer_index]
        if not isinstance(optimizer, SGD) or self._learner.scaler is not None or not skips_on_device(optimizer):
            return False
        # What had momentum has it until the state is another one: to look at all in each step would cost too much.
        known, key = self._without_momentum.get(optimizer_index), (id(optimizer.state), len(optimizer.state))
        if known is None or known[0] != key:
            state: Any = optimizer.state
            moved = [p for group in optimizer.param_groups if group.get("momentum") for p in group["params"]]
            without = [p for p in moved if state.get(p, {}).get("momentum_buffer") is None]
            known = self._without_momentum[optimizer_index] = (key, without)
        return any(p.grad is not None for p in known[1])

    def undo(self) -> None:
        """Put back what the blocked optimizers changed without gradients."""
        for optimizer_index in self.blocked:
            before = self._before.get(optimizer_index)
            if before is None:
                continue
            restore(self._learner, before, keep=partial(_is_of, optimizer_index))
            if optimizer_index not in self._learner.quasi_newton:
                del self._before[optimizer_index]

    def hold_back(self, optimizer: Optimizer) -> None:
        """The gradients of an optimizer are there, and it steps next: take them away if its update is blocked."""
        for optimizer_index in self.blocked:
            if self._learner.optimizers[optimizer_index] is optimizer and not self._scaler_skips(optimizer):
                for parameter in self._parameters(optimizer_index):
                    parameter.grad = None

    def _scaler_skips(self, optimizer: Optimizer) -> bool:
        return self._learner.scaler is not None and unscales_itself(optimizer)

    def _parameters(self, optimizer_index: int) -> list[Any]:
        return [p for group in self._learner.optimizers[optimizer_index].param_groups for p in group["params"]]

    def _keep(self, optimizer_index: int) -> None:
        # Only its own weights: others may have made good steps since. Buffers are the batch scope's.
        leaves = [*self._learner.weights_of(optimizer_index), *self._learner.optimizer_leaves(optimizer_index)]
        reuse = self._before.get(optimizer_index)
        self._before[optimizer_index] = capture(self._learner, step=0, global_step=0, leaves=leaves, reuse=reuse)


def _is_of(optimizer_index: int, path: StateKey) -> bool:
    return path[0] == "parameter" or (path[0] in ("optimizer", "group") and path[1] == optimizer_index)
