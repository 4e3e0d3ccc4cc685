"""Runs a micro-batch once and checks the result. It knows whether the run is a repeated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch

from lightning_nanguard.act.patches import wrap_method
from lightning_nanguard.distributed.collective_count import collectives_begun
from lightning_nanguard.trainer.private.callbacks import is_from_callback
from lightning_nanguard.trainer.private.closures import accumulates, call_after_backward, changes_gradients, uncounted
from lightning_nanguard.trainer.repeat.numeric_errors import may_be_numeric
from lightning_nanguard.trainer.repeat.outcome import BadLossError, Outcome, nan_loss
from lightning_nanguard.trainer.repeat.parts import RepeatParts
from lightning_nanguard.trainer.repeat.window import WindowEntry
from lightning_nanguard.types import Fault


@final
class Attempts:
    """Runs micro-batches, for the first time or again.

    Args:
        parts: The objects that all classes of this package share.

    Attributes:
        allowed: Whether steps may be repeated in this run.
        together: Whether several ranks repeat them together.
        repeats: Whether the present run of a micro-batch is a repeated one.
        collectives: With several ranks: the collectives that the newest whole ``training_step`` called.
    """

    def __init__(self, parts: RepeatParts) -> None:
        self._parts = parts
        self._check = parts.check
        self._window = parts.window
        # Whether a finite loss that is far too large is checked, too.
        self._extreme = parts.keeper is not None and parts.keeper.always
        self._careful = changes_gradients(parts.trainer, parts.module)
        self.together = self._check.together()
        self.allowed = parts.guard.context.acts_alone or self.together
        self.repeats = self._may_pass = False
        self.collectives = 0
        # Whether the present forward pass is over, and the function that replaces it.
        self._forward_over = False
        self._instead: Any = None
        # With several ranks: the function that replaces training_step, and the exception replaced by a loss of NaN.
        self._step: Callable[[], Any] | None = None
        self._caught: Exception | None = None

    def forward(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass; in a window, end the run of a bad micro-batch before its backward pass."""
        if self._instead is not None:
            return self._instead
        self._forward_over = False
        result = self._forward_among_ranks(forward) if self.together else forward()
        self._forward_over = True
        if not self.together and self.accumulating() and self.may_repeat() and not self._may_pass:
            fault = self._check.fault_of_loss(result.closure_loss)
            if fault is not None:
                raise BadLossError(fault, result)
        return result

    def _forward_among_ranks(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass. After an exception, go on to the backward pass, because other ranks wait there."""
        undo = wrap_method(self._parts.module, "training_step", self._training_step)
        try:
            return forward()
        finally:
            undo()

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._step is not None:
            return self._step()
        begun = collectives_begun()
        try:
            result = original(*args, **kwargs)
        except Exception as error:
            batch = self._window.micros[-1].run.batch if self._window.micros else None
            with self._parts.replay.batches.as_begun():
                numeric = may_be_numeric(error, batch) and not is_from_callback(error, self._parts.is_guard)
            # Other ranks would wait in a collective of the step that this one does not reach.
            missed = collectives_begun() - begun < self.collectives
            if missed or not (self.repeats or (numeric and self.may_repeat() and self._check.reads_in_time())):
                raise
            self._caught = error
            return nan_loss(self._parts.module)
        self.collectives = collectives_begun() - begun
        return result

    @contextmanager
    def in_place_of_step(self, step: Callable[[], Any]) -> Iterator[None]:
        """Inside, ``training_step`` is replaced, within the strategy's wrapper."""
        self._step = step
        try:
            yield
        finally:
            self._step = None

    def accumulating(self) -> bool:
        """Whether the present update has more than one micro-batch."""
        return len(self._window.micros) > 1 or accumulates(self._parts.trainer)

    def may_repeat(self) -> bool:
        """Whether the present update can be repeated."""
        return self.allowed and self._parts.memory.repeatable and self._window.is_kept()

    def attempt(self, micro: WindowEntry, *, steps: bool) -> Outcome:
        """Run a micro-batch once, and check the result.

        Args:
            micro: The micro-batch.
            steps: Whether its update follows.
        """
        self._caught = None
        try:
            result = micro.run.whole()
        except BadLossError as bad:
            return Outcome(bad.result, bad.fault, early=True)
        except Exception as error:
            with self._parts.replay.batches.as_begun():
                numeric = self.repeats or may_be_numeric(error, micro.run.batch)
            if is_from_callback(error, self._parts.is_guard) or not numeric:
                raise
            return Outcome(error=error, early=not self._forward_over)
        if not self.repeats:
            micro.raised = self._caught
        if not steps:
            return Outcome(result, caught=self._caught)
        return Outcome(result, self.weighed_fault(extreme=self._extreme), caught=self._caught)

    def weighed_fault(self, *, extreme: bool = False) -> Fault | None:
        """The fault of the present update. It first scales the gradients to the mean over the good micro-batches.

        Args:
            extreme: Whether a finite loss that is far too large counts as a fault.
        """
        self._window.weigh(self._gradients)
        if self.together and self.repeats:
            return self._check.fault_on_any(careful=self._careful)
        return self._check.fault(careful=self._careful, extreme=extreme)

    @contextmanager
    def repeating(self, *, counted: bool, instead: Any = None) -> Iterator[None]:
        """Inside, runs are repeated ones.

        Args:
            counted: Whether hooks and progress of the micro-batch were already done by an earlier run.
            instead: The function that replaces the forward pass.
        """
        self.repeats, self._instead = True, instead
        try:
            with uncounted(self._parts.trainer, self._parts.is_guard) if counted else nullcontext():
                yield
        finally:
            self.repeats, self._instead = False, None

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, a bad loss may go on to its backward pass."""
        self._may_pass = True
        try:
            yield
        finally:
            self._may_pass = False

    def call_missed_hooks(self, first: Outcome) -> None:
        """Call ``on_after_backward`` if the first run ended in its backward pass, and a repeated one did not.

        Args:
            first: The outcome of the first run.
        """
        if first.error is not None and not first.early:
            call_after_backward(self._parts.trainer, self._parts.is_guard)

    def rewind(self, micro: WindowEntry, outcome: Outcome) -> None:
        """Restore everything except the gradients to the start of a micro-batch, after a run with an outcome."""
        if not outcome.early:
            self._check.drop_losses()
        self._window.rewind(micro)

    def _gradients(self) -> list[torch.Tensor]:
        return self._parts.guard.context.learner.gradients(0)
