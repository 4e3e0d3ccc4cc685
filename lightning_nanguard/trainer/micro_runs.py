"""Runs a micro-batch once and looks at what it gave; says which runs are repeated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.trainer.numeric_errors import is_numeric
from lightning_nanguard.trainer.private.callbacks import is_from_callback
from lightning_nanguard.trainer.private.closures import accumulates, changes_gradients, uncounted
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.step_outcome import BadLossError, Outcome
from lightning_nanguard.trainer.window import Micro, Window
from lightning_nanguard.types import Fault


@final
class MicroRuns:
    """Runs micro-batches, for the first time or again.

    Args:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        window: The micro-batches of the update at hand.
        memory: What is remembered before a step.
        listens: Says which callback is the guard's.
        extreme: Whether a loss that is finite and out of all proportion is looked at, too.

    Attributes:
        allowed: Whether steps may be made again in this run.
        repeats: Whether a micro-batch is being run again.
        may_pass: Whether a bad loss may go on to its backward pass.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        guard: Guard,
        window: Window,
        memory: StepMemory,
        listens: Callable[[Any], bool],
        *,
        extreme: bool,
    ) -> None:
        self._trainer = trainer
        self._guard = guard
        self._check = guard.steps
        self._window = window
        self._memory = memory
        self._listens = listens
        self._extreme = extreme
        self._careful = changes_gradients(trainer, module)
        self.allowed = guard.steps.allowed()
        self.repeats = self.may_pass = False
        # Whether the forward pass at hand is over, and what takes its place.
        self._forward_over = False
        self._instead: Any = None

    def forward(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass; in a window, end the run of a bad micro-batch before its backward pass."""
        if self._instead is not None:
            return self._instead
        self._forward_over = False
        result = forward()
        self._forward_over = True
        if self.accumulating() and self.may_repeat() and not self.may_pass:
            fault = self._check.fault_of_loss(result.closure_loss, 0)
            if fault is not None:
                raise BadLossError(fault, result)
        return result

    def accumulating(self) -> bool:
        """Whether the update at hand has more than one micro-batch."""
        return len(self._window.micros) > 1 or accumulates(self._trainer)

    def may_repeat(self) -> bool:
        """Whether the update at hand can be made again."""
        return self.allowed and self._memory.repeatable and self._window.is_kept()

    def attempt(self, micro: Micro, *, steps: bool) -> Outcome:
        """Run a micro-batch once, and look at what it gave.

        Args:
            micro: The micro-batch.
            steps: Whether its update follows.
        """
        try:
            result = micro.run.whole()
        except BadLossError as bad:
            return Outcome(bad.result, bad.fault, early=True)
        except Exception as error:
            if is_from_callback(error, self._listens) or not (self.repeats or is_numeric(error)):
                raise
            return Outcome(error=error, early=not self._forward_over)
        if not steps:
            return Outcome(result)
        return Outcome(result, self.weighed_fault(extreme=self._extreme))

    def weighed_fault(self, *, extreme: bool = False) -> Fault | None:
        """What is wrong with the update at hand, once its gradients are those of the mean over what is left of it.

        Args:
            extreme: Whether a loss that is finite and out of all proportion counts.
        """
        self._window.weigh(self._gradients)
        return self._check.fault(0, careful=self._careful, extreme=extreme)

    @contextmanager
    def repeating(self, *, counted: bool, passing: bool = False, instead: Any = None) -> Iterator[None]:
        """Inside, runs are repeated ones.

        Args:
            counted: Whether hooks have been called for the micro-batch, and progress was made.
            passing: Whether a bad loss may go on to its backward pass.
            instead: What takes the place of the forward pass.
        """
        self.repeats, self.may_pass, self._instead = True, passing, instead
        try:
            with uncounted(self._trainer, self._listens) if counted else nullcontext():
                yield
        finally:
            self.repeats, self.may_pass, self._instead = False, False, None

    def rewind(self, micro: Micro, outcome: Outcome) -> None:
        """Put everything but the gradients back to where a micro-batch began, after a run that gave an outcome."""
        if not outcome.early:
            self._check.drop_losses()
        self._window.rewind(micro)

    def _gradients(self) -> list[torch.Tensor]:
        return self._guard.context.learner.gradients(0)
