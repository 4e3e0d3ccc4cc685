"""Skips one optimizer's step, so that the update does not reach the weights, with any optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot, capture

_logger = logging.getLogger("lightning_nanguard")
_READ_FOUND_INF = (Adam, AdamW, SGD, Adagrad)
_HOST = torch.device("cpu")


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether a GradScaler leaves unscaling and skipping to the optimizer."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips a step when a ``found_inf`` flag on the device says so, as torch's fused ones do.

    Only known classes count. Another optimizer may claim to support a GradScaler and read no such flag, and a subclass
    may override the step.
    """
    # Read from the groups, because loading the state of a run without fused steps changes only them.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in _READ_FOUND_INF and unscales_itself(optimizer) and fused


def _beside() -> torch.device | None:
    return None


@final
class StepSkipper:
    """Skips updates, and restores what an optimizer changes even in a skipped step.

    The gradients are removed just before the step (:meth:`remove_gradients`): after clipping, a GradScaler's check and
    the user's hooks, because some of these fail without gradients. After the step they are given back
    (:meth:`return_gradients`), because a captured graph writes to the same tensors each time. Without gradients,
    torch's own optimizers change nothing, except LBFGS: it changes its state and the weights between the closures of
    the step. Optimizers of other packages may count steps in their groups, or change the weights without a gradient.
    For LBFGS and for these a copy of the state is kept.

    Args:
        learner: The learner.
        where: Returns the device of a copy; ``None`` for that of the original.

    Attributes:
        skipped: Indices of the optimizers whose update in this batch is skipped.
    """

    def __init__(self, learner: Learner, where: Callable[[], torch.device | None] = _beside) -> None:
        self._learner = learner
        self._where = where
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._said = False
        self._copies: dict[int, Snapshot] = {}
        self._without_momentum: dict[int, tuple[tuple[int, int], list[Any]]] = {}
        self._stripped: set[int] = set()
        self.skipped: set[int] = set()

    def open(self) -> None:
        """A batch begins: nothing is skipped yet. Copy the state that could not be restored later."""
        self.skipped.clear()
        self._copies = {index: copy for index, copy in self._copies.items() if index in self._learner.quasi_newton}
        for index in self._learner.quasi_newton:
            self._copy(index)

    def skip(self, optimizer_index: int) -> None:
        """Skip the update that this optimizer is about to make."""
        optimizer = self._learner.optimizers[optimizer_index]
        self.skipped.add(optimizer_index)
        if optimizer_index not in self._copies and not type(optimizer).__module__.startswith("torch.optim"):
            self._copy(optimizer_index)

    def device_cannot_skip(self, optimizer_index: int) -> bool:
        """Whether the device must not skip the next update itself, although the optimizer supports this.

        Fused SGD allocates the momentum of a parameter in its first step. If the device skips this step, the momentum
        stays uninitialised, and the next step uses it.
        """
        optimizer = self._learner.optimizers[optimizer_index]
        if not isinstance(optimizer, SGD) or self._learner.scaler is not None or not skips_on_device(optimizer):
            return False
        # Cached until the state is replaced, because a check of all parameters in each step is slow.
        known, key = self._without_momentum.get(optimizer_index), (id(optimizer.state), len(optimizer.state))
        if known is None or known[0] != key:
            state: Any = optimizer.state
            moved = [p for group in optimizer.param_groups if group.get("momentum") for p in group["params"]]
            without = [p for p in moved if state.get(p, {}).get("momentum_buffer") is None]
            known = self._without_momentum[optimizer_index] = (key, without)
        return any(p.grad is not None for p in known[1])

    def undo(self) -> None:
        """Restore what the optimizers changed in their skipped steps."""
        for optimizer_index in self.skipped:
            before = self._copies.get(optimizer_index)
            if before is None:
                continue
            restore(self._learner, before, keep=partial(_belongs_to, optimizer_index))
            if optimizer_index not in self._learner.quasi_newton:
                del self._copies[optimizer_index]

    def remove_gradients(self, optimizer: Optimizer) -> None:
        """Remove the gradients of an optimizer that steps next, if its update is skipped."""
        for optimizer_index in self.skipped:
            if self._learner.optimizers[optimizer_index] is optimizer:
                self._stripped.add(optimizer_index)
                for parameter in self._parameters(optimizer_index):
                    if parameter.grad is not None:
                        self._taken.append((parameter, parameter.grad))
                        parameter.grad = None

    def return_gradients(self) -> None:
        """Give back the removed gradients, unless there are new ones."""
        self._stripped.clear()
        while self._taken:  # if a step has several evaluations, the last one counts
            parameter, gradient = self._taken.pop()
            if parameter.grad is None:
                parameter.grad = gradient

    def excuses(self, optimizer: Optimizer, *, numeric: bool) -> bool:
        """Whether a skipped update caused an exception of an optimizer's step.

        Some optimizers need a gradient of every parameter, and some ways of clipping reject one that is not finite.

        Args:
            optimizer: The optimizer.
            numeric: Whether NaN or Inf can be the cause of the exception.
        """
        numbers = self.skipped if numeric else self._stripped
        return any(self._learner.optimizers[number] is optimizer for number in numbers)

    def _parameters(self, optimizer_index: int) -> list[Any]:
        return [p for group in self._learner.optimizers[optimizer_index].param_groups for p in group["params"]]

    def _copy(self, optimizer_index: int) -> None:
        # Only the weights of this optimizer, because others may have made good steps. The batch's undo restores
        # buffers.
        leaves = [*self._learner.weights_of(optimizer_index), *self._learner.optimizer_leaves(optimizer_index)]
        reuse = self._copies.pop(optimizer_index, None)
        for device in dict.fromkeys((self._where(), _HOST)):
            try:
                self._copies[optimizer_index] = capture(
                    self._learner, step=0, global_step=0, leaves=leaves, reuse=reuse, device=device
                )
                return
            except (OutOfMemory, MemoryError):
                continue
        if not self._said:
            self._said = True
            _logger.warning(
                "NaNGuard: there is not enough memory for a copy of what %s may change in a skipped step, so these "
                "changes are not undone. torch's own optimizers need no copy.",
                type(self._learner.optimizers[optimizer_index]).__name__,
            )


def _belongs_to(optimizer_index: int, key: StateKey) -> bool:
    return key[0] == "parameter" or (key[0] in ("optimizer", "wrapped", "group", "own") and key[1] == optimizer_index)
