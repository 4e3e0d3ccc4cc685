"""Undoes a skipped batch's changes to the module's attributes, under manual optimization."""

from __future__ import annotations

from functools import partial
from typing import final

from torch import nn

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.state.attribute_memory import AttributeMemory, AttributeNumbers
from lightning_nanguard.state.random_state import is_checked


@final
class CarriedAttributes:
    """Saves the module's attributes before each batch, such as a hidden state that the next batch needs.

    Args:
        module: The trained module.
        guard: Restores them if the batch is skipped.
    """

    def __init__(self, module: nn.Module, guard: Guard) -> None:
        thresholds = guard.context.thresholds.batches.repeated
        self._memory = AttributeMemory(module, thresholds)
        self._numbers = AttributeNumbers(thresholds)
        self._undos = guard.steps.undos
        self._every = thresholds.checked_every
        self._opened = 0

    def open(self) -> None:
        """A batch begins."""
        self._numbers.begin()
        before = self._memory.open(checked=is_checked(self._opened, self._every))
        self._opened += 1
        self._undos.also(partial(before.restore, plain=False))
        self._undos.also(self._numbers.undo)
        self._numbers.open(before)

    def close(self) -> None:
        """The batch has run."""
        self._memory.close()
