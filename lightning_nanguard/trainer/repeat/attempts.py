"""Runs a micro-batch once and checks the result, and has the objects that all classes which repeat steps share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import repeat
from typing import Any, final

import torch

from lightning_nanguard.act.patches import wrapped
from lightning_nanguard.distributed.collectives import collectives_begun
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.restore import part_of_snapshot, weights_if_room
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.callbacks import IsGuard, is_from_callback
from lightning_nanguard.trainer.private.closures import accumulates, call_after_backward, changes_gradients, uncounted
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.repeat.accumulation_window import AccumulationWindow, WindowEntry
from lightning_nanguard.trainer.repeat.numeric_errors import finite_in, may_be_numeric, with_values_of
from lightning_nanguard.trainer.repeat.outcome import BadLossError, Outcome, nan_loss
from lightning_nanguard.trainer.sample_keeper import SampleKeeper
from lightning_nanguard.types import Fault


@final
class Attempts:
    """Runs micro-batches, for the first time or again; the other classes of this folder get what they share from it.

    Args:
        trainer: The trainer.
        module: Its module.
        guard: The guard.
        replay: Keeps the batches, and makes the objects that undo a micro-batch.
        is_guard: Says whether a callback is the guard.
        keeper: Gives the good samples of a bad batch; ``None`` if bad batches are skipped as a whole.

    Attributes:
        check: Checks losses and gradients.
        window: The micro-batches of the present update.
        memory: Saves the state before a step.
        allowed: Whether steps may be repeated in this run.
        together: Whether several ranks repeat them together.
        repeats: Whether the present run of a micro-batch is a repeated one.
        collectives: With several ranks: the collectives that the newest whole ``training_step`` called.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        guard: Guard,
        replay: TrainerBatchReplay,
        is_guard: IsGuard,
        keeper: SampleKeeper | None,
    ) -> None:
        thresholds = guard.context.thresholds.batches.repeated
        self.trainer = trainer
        self.module = module
        self.guard = guard
        self.replay = replay
        self.is_guard = is_guard
        self._keeper = keeper
        self.check = guard.steps.check
        self.window = AccumulationWindow(trainer, guard.steps.undos, thresholds)
        self.memory = StepMemory(module, thresholds)
        # Whether a finite loss that is far too large is checked, too.
        self._extreme = keeper is not None and keeper.always
        self._careful = changes_gradients(trainer, module)
        self.together = self.check.together()
        self.allowed = guard.context.acts_alone or self.together
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
            fault = self.check.fault_of_loss(result.closure_loss)
            if fault is not None:
                raise BadLossError(fault, result)
        return result

    def _forward_among_ranks(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass. After an exception, go on to the backward pass, because other ranks wait there."""
        with wrapped(self.module, "training_step", self._training_step):
            return forward()

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._step is not None:
            return self._step()
        begun = collectives_begun()
        try:
            result = original(*args, **kwargs)
        except Exception as error:
            batch = self.window.micros[-1].run.batch if self.window.micros else None
            with self.replay.batches.as_begun():
                numeric = may_be_numeric(error, batch) and not is_from_callback(error, self.is_guard)
            # Other ranks would wait in a collective of the step that this one does not reach.
            missed = collectives_begun() - begun < self.collectives
            if missed or not (self.repeats or (numeric and self.may_repeat() and self.check.reads_in_time())):
                raise
            self._caught = error
            return nan_loss(self.module)
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
        return len(self.window.micros) > 1 or accumulates(self.trainer)

    def may_repeat(self) -> bool:
        """Whether the present update can be repeated."""
        return self.allowed and self.memory.repeatable and self.window.is_kept()

    def active_keeper(self) -> SampleKeeper | None:
        """Gives the good samples of a bad batch; ``None`` if they are not to be kept now."""
        return self._keeper if self._keeper is not None and self._keeper.active() else None

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
            with self.replay.batches.as_begun():
                numeric = self.repeats or may_be_numeric(error, micro.run.batch)
            if is_from_callback(error, self.is_guard) or not numeric:
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
        self.window.weigh(partial(self.guard.context.learner.gradients, 0))
        if self.together and self.repeats:
            return self.check.fault_on_any(careful=self._careful)
        return self.check.fault(careful=self._careful, extreme=extreme)

    @contextmanager
    def repeating(self, *, counted: bool, instead: Any = None) -> Iterator[None]:
        """Inside, runs are repeated ones.

        Args:
            counted: Whether hooks and progress of the micro-batch were already done by an earlier run.
            instead: The function that replaces the forward pass.
        """
        self.repeats, self._instead = True, instead
        try:
            with uncounted(self.trainer, self.is_guard) if counted else nullcontext():
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

    def gradients(self) -> list[Any]:
        """Copies of the gradients; ``None`` for a parameter without one."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.module.parameters()]

    def gradients_if_room(self) -> list[Any] | None:
        """Copies of the gradients; ``None`` if there is not enough memory."""
        try:
            return self.gradients()
        except OutOfMemory:
            return None

    def give_gradients(self, gradients: Iterable[Any] = repeat(None)) -> None:
        """Set the gradients; by default, remove them."""
        for parameter, gradient in zip(self.module.parameters(), gradients, strict=False):
            parameter.grad = gradient

    def undo_if_room(self) -> BatchUndo | None:
        """An object that undoes a micro-batch; ``None`` if memory is not enough for it and for copies of gradients."""
        try:
            undo = self.replay.make_undo(thorough=True)
            undo.open()
        except OutOfMemory:
            return None
        return None if self.gradients_if_room() is None else undo

    def call_missed_hooks(self, first: Outcome) -> None:
        """Call ``on_after_backward`` if the first run ended in its backward pass, and a repeated one did not.

        Args:
            first: The outcome of the first run.
        """
        if first.error is not None and not first.early:
            call_after_backward(self.trainer, self.is_guard)

    def rewind(self, micro: WindowEntry, outcome: Outcome) -> None:
        """Restore everything except the gradients to the start of a micro-batch, after a run with an outcome."""
        if not outcome.early:
            self.check.drop_losses()
        self.window.rewind(micro)

    # ---------------------------------------------------------------------------------------- the cause of an exception

    def caused_by_numbers(self, micro: WindowEntry, *, backward: bool) -> bool:
        """Whether a step that raised succeeds with other numbers in the batch, or with the last good weights.

        The other numbers come from an earlier batch, or are zeros instead of NaN and Inf. The batch keeps its
        structure, shape and index, and runs from the same random numbers and attributes. So an exception with another
        cause is raised again.

        Args:
            micro: The micro-batch.
            backward: Whether the exception was raised in the backward pass.
        """
        micro.start.restore_batch()
        batch, context = micro.run.batch, self.guard.context
        earlier = self.replay.batches.earlier()
        # In the first update the user's code is at fault.
        others = [finite_in(batch)] if earlier is not None or context.state.step else []
        if earlier is not None:
            # A healthy batch may hold NaN that did no harm there but causes the exception here.
            other = with_values_of(batch, earlier)
            others = [other, finite_in(other), *others]
        others = [one for one in others if one is not None]
        if any(self._succeeds(micro, one, backward=backward) for one in others):
            return True
        good = context.ring.last_certified
        mine = None if good is None else weights_if_room(context.learner, device=good.device())
        if good is None or mine is None:
            return False
        with part_of_snapshot(context.learner, good, mine):
            # Batch and weights may both be bad.
            return any(self._succeeds(micro, one, backward=backward) for one in (batch, *others))

    def _succeeds(self, micro: WindowEntry, batch: Any, *, backward: bool) -> bool:
        try:
            with self.replay.untraced():
                micro.start.restore()
                loss = self.replay.step.loss_with_graph(batch, micro.run.batch_idx)
                if loss is None:
                    return True
                if backward:
                    parameters = [p for p in self.module.parameters() if p.requires_grad]
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                return bool(torch.isfinite(loss.detach()).all())
        except Exception:
            return False
