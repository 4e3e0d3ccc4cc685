"""Checks an update after backward and before the optimizer's step, so that a bad one can be made again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from torch import Tensor

from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.diagnosis.state_comparison import unexplained_change
from lightning_nanguard.distributed.ranks import first_over_ranks
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.rank_readback import RankReadback
from lightning_nanguard.guard.readback import Readback
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.measure.tensors import is_on_host
from lightning_nanguard.record.text import shortened
from lightning_nanguard.state.batch_undo import BatchUndo, Undo
from lightning_nanguard.state.learner import StateKey
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Evidence, Fault, Finding, Reading

# Only steps of automatic optimization are made again, and it has one optimizer.
_OPTIMIZER = 0


@final
class StepCheck:
    """Tells a loop whether the next update is certainly bad, and restores what is needed to make it again.

    A reading made here is also the one that the guard judges before the optimizer's step. Nothing is read twice.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Finds causes.
        meter: Measures loss and gradient.
        caution: Decides which updates are read before they are made.
        recorder: Records what was made again.
        policy: Decides whether a rollback is allowed.
        undos: The first one undoes what the present batch changed.
        within: Undoes what one micro-batch of a window changed.
        readback: Forgets readings of undone states. With several ranks it reports a bad update to the others.
    """

    def __init__(
        self,
        context: GuardContext,
        loop: TrainingLoop,
        meter: Meter,
        caution: Caution,
        recorder: InterventionRecorder,
        policy: Policy,
        undos: deque[BatchUndo],
        within: BatchUndo,
        readback: Readback,
    ) -> None:
        self._context = context
        self._loop = loop
        self._meter = meter
        self._caution = caution
        self._recorder = recorder
        self._policy = policy
        self._undos = undos
        self._within = within
        self._is_within = False
        self._readback = readback
        self._ranks = readback if isinstance(readback, RankReadback) else None
        self._seen_by: tuple[int, ...] = ()
        self._limits = context.thresholds.batches.repeated
        # How often the fault at a place was gone when its step was made again.
        self.transient: Counter[str] = Counter()

    def allowed(self) -> bool:
        """Whether a step may be made again: only with a single process, and not if the guard only observes."""
        context = self._context
        return not (context.many or context.ranks.sharded or context.settings.observe)

    def share_skipped(self, least: int) -> float:
        """Share of skipped updates within the budget's window; 0.0 before ``least`` updates.

        Args:
            least: Number of updates from which the share is given.
        """
        seen = min(self._policy.budget.window, self._context.state.step)
        return 0.0 if seen < least else len(self._context.state.policy.skips) / seen

    def together(self) -> bool:
        """Whether several ranks make steps again together: with whole parameters, one optimizer and no GradScaler."""
        context, learner = self._context, self._context.learner
        plain = len(learner.optimizers) == 1 and not learner.quasi_newton and learner.scaler is None
        return context.many and not (context.ranks.sharded or context.settings.observe) and plain

    def reads_in_time(self) -> bool:
        """Whether the next update is read before it is made."""
        return not self._caution.may_be_late(_OPTIMIZER)

    def fault(self, *, careful: bool, extreme: bool = False) -> Fault | None:
        """The certain fault of the next update; ``None`` if there is none, or if the update is read late.

        Args:
            careful: Whether other code may change the gradients before the optimizer's step.
            extreme: Whether a finite fault also counts, if the batch and its loss or gradient are far too large.
        """
        if not self.reads_in_time():
            return None
        reading = self._meter.measure_early(self._context.state.step + 1, _OPTIMIZER, careful=careful)
        if reading is None or (reading.finite and self._context.monitors.calm(reading)):
            return None
        reading = self._context.state.unusual(reading)
        if self._context.learner.scaler is not None and reading.loss_finite and not reading.finite:
            return None  # an overflow, which the scaler skips
        return self._fault_of(reading, extreme=extreme) if self._ranks is None else self._fault_of_all(reading)

    def _fault_of_all(self, reading: Reading) -> Fault | None:
        """The fault of an update whose gradient is bad on all ranks; ``None`` if only some ranks see it."""
        assert self._ranks is not None
        if reading.gradient_finite:
            return None
        heard = self._ranks.tell_early(reading, self._undos[0])
        if heard is None:
            return None
        combined, self._seen_by = heard
        fault = self._context.monitors.check(combined)
        if fault is None or fault.place != "gradient":
            return fault
        named = self._meter.first_bad_gradient(reading.optimizer_index)
        return replace(fault, place=first_over_ranks(self._context.ranks, named)[0] or fault.place)

    def _fault_of(self, reading: Reading, *, extreme: bool = False) -> Fault | None:
        index = reading.optimizer_index
        line_search = self._meter.is_line_search(index)
        fault = self._context.monitors.check(reading, line_search=line_search)
        if fault is None or fault.scope != "batch":
            return None
        if not fault.certain:
            strange = extreme and fault.extreme and self._context.replay.batch_strange(extreme=True)
            return fault if strange else None
        named = self._meter.first_bad_gradient(index) if fault.place == "gradient" and not reading.finite else None
        return fault if named is None else replace(fault, place=named)

    def fault_of_loss(self, loss: Tensor | None) -> Fault | None:
        """The fault of one micro-batch's loss, before its backward pass; ``None`` if reading the loss would wait."""
        if loss is None or not is_on_host(loss) or loss.numel() != 1:
            return None
        value = float(loss.detach())
        if value - value == 0.0 or self._context.state.bad_losses_usual:
            return None
        reading = Reading(self._context.state.step + 1, _OPTIMIZER, value, None, finite=False, loss_finite=False)
        return self._context.monitors.check(reading)

    def fault_of_gradients(self) -> Fault | None:
        """The certain fault of the gradients accumulated so far; ``None`` without one. Reads from the device."""
        norm = self._meter.gradient_norm(_OPTIMIZER)
        finite = self._meter.first_bad_gradient(_OPTIMIZER) is None
        return self._fault_of(Reading(self._context.state.step + 1, _OPTIMIZER, None, norm, finite=finite))

    def rewind(self) -> None:
        """Restore the buffers, metrics and means that the present batch or window of accumulation has changed."""
        self._undos[0].undo()

    def measures(self) -> Sequence[Undo]:
        """Functions that restore metrics and means as before the present batch or window, even after later batches."""
        return self._undos[0].measures()

    def undo_also(self, undo: Callable[[], None]) -> None:
        """Add a function that is called if the present batch, or the window, is undone."""
        self._undos[0].also(undo)

    def open_batch(self, *, within: bool) -> None:
        """Note that a batch begins, or with ``within`` the next micro-batch of a window."""
        self._is_within = within
        (self._within if within else self._undos[0]).open()

    def undo_spoilt_buffers(self) -> None:
        """Restore buffers that a forward pass made NaN or Inf, if no update is made from its batch.

        A user who returns no loss for a bad batch, or does not step, does not undo its effect on batch norm.
        """
        if not self.allowed():
            return
        finite, undo = self._context.finite, self._within if self._is_within else self._undos[0]
        before: dict[StateKey, Tensor] = {("buffer", name): buffer for name, buffer in undo.before().items()}
        now = list(self._context.learner.leaves())
        spoilt = finite.corrupt((key, leaf) for key, leaf in now if key in before)
        sound = finite.corrupt(before.items()) is None
        if spoilt is None or not sound or finite.corrupt((key, leaf) for key, leaf in now if key not in before):
            return  # the bad value has another source
        message = f"the forward pass made {spoilt} NaN or Inf, and no update was made from its batch"
        fault = Fault("non_finite_statistics", "batch", spoilt, None, message)
        finding = self.diagnosis(fault)
        undo.undo()
        self._recorder.record(fault, spoilt, ("undo",), self._context.rate.effective(), finding)

    def pass_over(self) -> None:
        """Leave the present update out without a record: every sample of it is known to be bad."""
        self._context.state.passed_over = True

    def begin_again(self, undo: Callable[[], None]) -> None:
        """Note that the present batch begins again from another state, and store what it may change.

        Args:
            undo: Also called if the batch is undone.
        """
        self._undos[0].open()
        self._undos[0].also(undo)

    def drop_losses(self) -> None:
        """Forget the losses that were seen, because their micro-batches are run again."""
        self._meter.drop_early()
        self._meter.drop_losses()
        if self._ranks is not None:
            self._ranks.forget_told()

    def drop_last_loss(self) -> None:
        """Forget the newest loss, because its micro-batch is left out."""
        self._meter.drop_last_loss()

    def may_go_back(self, fault: Fault) -> bool:
        """Whether a rollback for a fault is allowed."""
        return self._policy.may_repeat_updates(fault, self.number, self._context.state.policy)

    def state_is_finite(self) -> bool:
        """Whether the learner is finite, so that the batch or the step is at fault."""
        return self._context.corrupt()[0] is None

    @property
    def number(self) -> int:
        """Number of the update that is about to be made."""
        return self._context.state.step + 1

    def in_words(self, error: BaseException | None) -> str | None:
        """The words for an exception of ``training_step`` in a record; ``None`` without one."""
        if error is None:
            return None
        text = shortened(str(error), self._limits.message)
        return f"training_step raised {type(error).__name__}: {text}"

    def raised(self, words: str | None) -> None:
        """Note an exception of ``training_step`` on any rank. The next loss that is not finite stands for it.

        Args:
            words: The result of :meth:`in_words` on that rank; ``None`` without an exception.
        """
        self._context.state.raised = words

    def spoilt_since(self, snapshot: Snapshot) -> tuple[str, str]:
        """A tensor that became bad by itself since a snapshot, and how; empty if none is known."""
        context = self._context
        corrupt = context.corrupt()[0] or context.finite.spoilt_buffer(context.learner.leaves(), snapshot.leaves)
        if corrupt is not None:
            return corrupt, "is no longer finite"
        change = unexplained_change(context.learner, snapshot)
        return ("", "") if change is None else (change.name, f"went from {change.before:.4g} to {change.now:.4g}")

    def record_transient(
        self,
        fault: Fault,
        *,
        spoilt: tuple[str, str] = ("", ""),
        since: Snapshot | None = None,
        late: int | None = None,
        counters: Sequence[str] = (),
    ) -> None:
        """Record that a fault was gone when its step was made again.

        Args:
            fault: The fault.
            spoilt: The tensor that had become bad, and how.
            since: The snapshot from which all updates were made again, because the state had become bad by itself;
                ``None`` if only the step was made again.
            late: Number of the bad update, if its reading arrived after it was made.
            counters: Attributes that had to be reset for the fault to go.
        """
        state = self._context.state
        if since is not None:
            state.policy = self._policy.count_repeated_updates(fault, self.number, state.policy)
            self._readback.clear()  # they belong to undone states, like the pending snapshot
            self._context.ring.drop_pending()
        tensor, how = spoilt
        if tensor:
            fault = replace(fault, place=tensor)
        self.transient[fault.place] += 1
        times = self.transient[fault.place]
        suggestion = "The step was made again from its own state, batch and random numbers, and the fault was gone."
        if since is not None:
            what = f"{tensor} {how} by itself." if tensor else "The state had gone bad by itself."
            what = what if late is None else f"Update {late} was read only after later updates had been made."
            suggestion = (
                f"{what} The updates since the snapshot at update {since.step} were made again from their own batches "
                "and random numbers, and the fault was gone."
            )
        if counters:
            names = ", ".join(counters[: self._context.thresholds.records.numbers_per_message])
            suggestion = f"The fault depends on what the step itself changes: look at how {names} is used."
        elif times >= self._limits.test_device:
            suggestion += " It keeps happening at this place: test the device."
        cause = "corrupted_state" if tensor else "transient"
        confidence = self._context.thresholds.diagnosis.confidence.transient
        finding = Finding(cause, confidence, {"times": float(times)}, fault.place, suggestion=suggestion)
        words = ("redo",) if since is None else ("restore", "redo")
        self._record(fault, *words, finding=finding, restored=since, late=late)

    def record_left_out(self, fault: Fault, finding: Finding | None, ranks: tuple[int, ...] = ()) -> None:
        """Record that a bad micro-batch was left out, and the update is made from the others of its window.

        Args:
            fault: The fault.
            finding: The cause.
            ranks: The ranks of the micro-batch, if there are several.
        """
        self._seen_by = ranks
        self._record(fault, "leave out", finding=finding)

    def record_kept(self, fault: Fault, finding: Finding | None) -> None:
        """Record that an update is made from the good samples of a bad batch."""
        self._record(fault, "keep good samples", finding=finding)

    def diagnosis(self, fault: Fault) -> Finding | None:
        """The cause of a fault of the present update."""
        state = self._context.state
        known = Evidence(step=state.step + 1, healthy_steps=state.healthy_steps)
        return self._loop.diagnose(fault, known, "replay", state.step + 1)

    def _record(
        self,
        fault: Fault,
        *words: str,
        finding: Finding | None,
        restored: Snapshot | None = None,
        late: int | None = None,
    ) -> None:
        # Without ``late`` the update is still to be made. The step of a record is that after its update.
        clock = self._recorder.now(unmade=True) if late is None else self._recorder.clock_of(late)
        rates = self._context.rate.effective()
        ranks, self._seen_by = self._seen_by, ()
        self._recorder.record(fault, fault.place, words, rates, finding, ranks, clock, restored)
        self._recorder.tried(fault, words)
