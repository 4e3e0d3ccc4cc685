"""The micro-batches of one update: one, or those of a window of accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.measure.batches import bytes_of
from lightning_nanguard.state.step_start import StepStart
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.private.closures import MicroBatchRun, accumulates, logging_for
from lightning_nanguard.trainer.private.packages import Trainer
from lightning_nanguard.types import Fault, Finding

NOTHING_LEFT = Fault("quarantine", "batch", "batch", None, "every sample of the batch is known to be bad")
"""Why a micro-batch is left out that was not run."""


@final
@dataclass(slots=True, eq=False)
class WindowEntry:
    """A micro-batch of the present update.

    Attributes:
        run: Runs it.
        start: The state at its start, except weights and buffers.
        left_out: The fault for which it is left out of the update; ``None`` if it is not left out.
        beside: Whether it is left out because another rank leaves out its own micro-batch of this index, and the step
            communicates.
        kept: Fault and cause if only its good samples are used; ``None`` if all are.
        loss: Its loss; ``None`` if it is not known.
        raised: The exception that its first run raised, if it was replaced by a loss of NaN for the other ranks.
    """

    run: MicroBatchRun
    start: StepStart
    left_out: Fault | None = None
    beside: bool = False
    kept: tuple[Fault, Finding | None] | None = None
    loss: Tensor | None = None
    raised: Exception | None = None

    @property
    def is_used(self) -> bool:
        """Whether it is part of the update."""
        return self.left_out is None and not self.beside


@final
class AccumulationWindow:
    """Keeps the micro-batches of the present update, so that they can be run again.

    Args:
        trainer: The trainer.
        undos: Restore the state before the window.
        thresholds: Bytes up to which batches are kept.

    Attributes:
        micros: The micro-batches so far, the newest last.
        completes: Whether the newest micro-batch is the last one of its update, so that the update follows.
        shares: Over all ranks, the micro-batches of the update and the good ones among them; ``None`` with one process.
    """

    def __init__(self, trainer: Trainer, undos: BatchUndos, thresholds: RepeatedStepsThresholds) -> None:
        self._trainer = trainer
        self._undos = undos
        self._limits = thresholds
        # Bytes of the micro-batches so far, and the number of micro-batches that were released to save memory.
        self._bytes, self._let_go = 0.0, 0
        self.micros: list[WindowEntry] = []
        self.completes = True
        self.shares: tuple[int, int] | None = None

    def add(self, run: MicroBatchRun, start: StepStart) -> WindowEntry:
        """Add a micro-batch that is about to be run."""
        micros = self.micros
        if run.zero_grad is not None:
            self.close()
        micros.append(WindowEntry(run, start))
        self.completes = not accumulates(self._trainer)
        if len(micros) > 1 or self._trainer.accumulate_grad_batches > 1:
            carried = [] if len(micros) == 1 else start.attributes.not_in(micros[-2].start.attributes)
            held = bytes_of([run.batch, *(one for one in carried if isinstance(one, Tensor))])
            self._bytes += math.inf if held is None else held
        if not self.is_kept():
            for earlier in micros[self._let_go : -1]:
                earlier.run.take(None)
                earlier.start = earlier.start.emptied()
            self._let_go = len(micros) - 1
        return micros[-1]

    def close(self) -> None:
        """The update is about to be made: release the batches."""
        self.micros.clear()
        self.shares = None
        self._bytes, self._let_go = 0.0, 0

    def is_kept(self) -> bool:
        """Whether every micro-batch of the update is kept."""
        micros = self.micros
        return bool(micros) and micros[0].run.zero_grad is not None and self._bytes <= self._limits.window_bytes

    def whole(self) -> list[WindowEntry]:
        """The micro-batches of an update that can be repeated unchanged; empty if it cannot."""
        return [] if self.left_out() or not self.is_kept() else self.micros

    def rewind(self, micro: WindowEntry) -> None:
        """Restore everything except the gradients to the start of a micro-batch.

        Changes by earlier micro-batches, such as running statistics, are made again by their forward passes.
        """
        self._undos.undo()
        for earlier in self.micros:
            if earlier is micro:
                break
            if earlier.left_out is None:
                earlier.start.restore()
                with logging_for(self._trainer, earlier.run.batch), torch.enable_grad():
                    earlier.run.forward()
        micro.start.restore()

    def left_out(self) -> list[tuple[WindowEntry, Fault]]:
        """The micro-batches that are left out, each with its fault."""
        return [(micro, micro.left_out) for micro in self.micros if micro.left_out is not None]

    def kept(self) -> list[tuple[WindowEntry, tuple[Fault, Finding | None]]]:
        """The micro-batches of which only the good samples are used, each with its fault and cause."""
        return [(micro, micro.kept) for micro in self.micros if micro.kept is not None]

    def weigh(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Scale the gradients to those of the mean over the micro-batches that are not left out.

        Lightning divides each loss by the length of a window.

        Args:
            gradients: Returns the gradients.
        """
        count = len(self.micros)
        good = count - len(self.left_out()) if count > 1 else count
        if self.shares is not None:
            count, good = self.shares
        if 0 < good < count:
            with torch.no_grad():
                for gradient in gradients():
                    gradient.mul_(count / good)
