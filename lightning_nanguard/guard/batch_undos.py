"""Undoes what the present batch, or the present window of accumulation, changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import final

from lightning_nanguard.state.batch_undo import BatchUndo, Undo


@final
class BatchUndos:
    """The objects that undo batches: one for each batch that may still have to be undone.

    Args:
        make_undo: Makes an object that undoes what a batch changed.
        open_batches: Number of batches that may have to be undone at a time. With late readings a batch is judged when
            later ones have run.
    """

    def __init__(self, make_undo: Callable[[], BatchUndo], open_batches: int) -> None:
        # The first one belongs to the present batch or window.
        self._undos = deque(make_undo() for _ in range(open_batches))
        self._within = make_undo()
        self._is_within = False

    @property
    def present(self) -> BatchUndo:
        """Undoes the present batch, or with accumulation the present window."""
        return self._undos[0]

    @property
    def newest(self) -> BatchUndo:
        """Undoes the newest forward pass: in a window, the newest micro-batch alone."""
        return self._within if self._is_within else self._undos[0]

    def open(self, *, within: bool) -> None:
        """Store what the next batch may change.

        Args:
            within: Whether it is a further micro-batch of the present window.
        """
        self._is_within = within
        if not within:
            self._undos.rotate(1)
        self.newest.open()

    def undo(self) -> None:
        """Restore the buffers, metrics and means that the present batch or window has changed."""
        self.present.undo()

    def measures(self) -> Sequence[Undo]:
        """Functions that restore metrics and means as before the present batch or window, even after later batches."""
        return self.present.measures()

    def also(self, undo: Undo) -> None:
        """Add a function that is called if the present batch or window is undone."""
        self.present.also(undo)

    def begin_again(self, undo: Undo) -> None:
        """The present batch begins again from another state: store what it may change.

        Args:
            undo: Also called if the batch is undone.
        """
        self.present.open()
        self.present.also(undo)
