"""Checks an update after backward and before the optimizer's step, so that a bad one can be made again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.diagnosis.state_comparison import unexplained_change
from lightning_nanguard.distributed.ranks import first_over_ranks
from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.caution import Caution
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.rank_readback import RankReadback, Readback
from lightning_nanguard.measure.tensors import is_on_host
from lightning_nanguard.record.text import shortened
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.fixed import EXCEPTION_TEXT
from lightning_nanguard.types import Fault, Reading

# Only steps of automatic optimization are made again, and it has one optimizer.
_OPTIMIZER = 0


@final
@dataclass(eq=False)
class StepCheck:
    """Tells a loop whether the next update is certainly bad, before it is made.

    A reading made here is also the one that the guard judges before the optimizer's step. Nothing is read twice.

    Args:
        context: Objects and settings that the parts of the guard share.
        meter: Measures loss and gradient.
        caution: Decides which updates are read before they are made.
        policy: Decides whether a rollback is allowed.
        undos: Undo the present batch.
        readback: With several ranks it reports a bad update to the others.

    Attributes:
        seen_by: The ranks that saw the fault of the newest bad update; empty with one process.
    """

    context: GuardContext
    meter: Meter
    caution: Caution
    policy: Policy
    undos: BatchUndos
    readback: Readback
    seen_by: tuple[int, ...] = field(default=(), init=False)

    def share_skipped(self, least: int) -> float:
        """Share of skipped updates within the budget's window; 0.0 before ``least`` updates.

        Args:
            least: Number of updates from which the share is given.
        """
        seen = min(self.policy.budget.window, self.context.state.step)
        return 0.0 if seen < least else len(self.context.state.policy.skips) / seen

    def together(self) -> bool:
        """Whether several ranks make steps again together: with whole parameters, one optimizer and no GradScaler."""
        context = self.context
        return context.many and not (context.ranks.sharded or context.settings.observe) and context.learner.is_plain

    def reads_in_time(self) -> bool:
        """Whether the next update is read before it is made."""
        return not self.caution.may_be_late(_OPTIMIZER)

    def fault(self, *, careful: bool, extreme: bool = False) -> Fault | None:
        """The certain fault of the next update; ``None`` if there is none, or if the update is read late.

        Args:
            careful: Whether other code may change the gradients before the optimizer's step.
            extreme: Whether a finite fault also counts, if the batch and its loss or gradient are far too large.
        """
        if not self.reads_in_time():
            return None
        reading = self.meter.measure_early(self.number, _OPTIMIZER, careful=careful)
        if reading is None or (reading.finite and self.context.monitors.calm(reading)):
            return None
        reading = self.context.state.unusual(reading)
        if self.context.learner.scaler is not None and reading.loss_finite and not reading.finite:
            return None  # an overflow, which the scaler skips
        if not self.context.many:
            return self._fault_of(reading, extreme=extreme)
        return None if reading.gradient_finite else self._fault_of_all(reading)

    def fault_on_any(self, *, careful: bool) -> Fault | None:
        """The certain fault of the next update, which all ranks have just made again; all ranks must call it.

        A hook of one rank may make a gradient bad after the ranks have synchronised it. It then counts as bad on all
        ranks, so that all of them do the same.

        Args:
            careful: Whether other code may change the gradients before the optimizer's step.
        """
        if not self.reads_in_time():
            return None
        reading = self.meter.measure_early(self.number, _OPTIMIZER, careful=careful)
        reading = self.context.state.unusual(reading or Reading(self.number, _OPTIMIZER, None, None))
        return self._fault_of_all(reading) if any(self.context.ranks.gather(not reading.gradient_finite)) else None

    def _fault_of_all(self, reading: Reading) -> Fault | None:
        """The fault of an update that looks bad to all ranks; ``None`` if only some ranks see it."""
        assert isinstance(self.readback, RankReadback)
        heard = self.readback.tell_early(reading, self.undos.present)
        if heard is None:
            return None
        combined, self.seen_by = heard
        fault = self.context.monitors.check(combined)
        if fault is None or fault.place != "gradient":
            return fault
        named = self.meter.first_bad_gradient(reading.optimizer_index)
        return replace(fault, place=first_over_ranks(self.context.ranks, named)[0] or fault.place)

    def _fault_of(self, reading: Reading, *, extreme: bool = False) -> Fault | None:
        index = reading.optimizer_index
        line_search = self.meter.is_line_search(index)
        fault = self.context.monitors.check(reading, line_search=line_search)
        if fault is None or fault.scope != "batch":
            return None
        if not fault.certain:
            strange = extreme and fault.extreme and self.context.replay.batch_strange(extreme=True)
            return fault if strange else None
        named = self.meter.first_bad_gradient(index) if fault.place == "gradient" and not reading.finite else None
        return fault if named is None else replace(fault, place=named)

    def fault_of_loss(self, loss: Tensor | None) -> Fault | None:
        """The fault of one micro-batch's loss, before its backward pass; ``None`` if reading the loss would wait."""
        if loss is None or not is_on_host(loss) or loss.numel() != 1:
            return None
        value = float(loss.detach())
        if value - value == 0.0 or self.context.state.bad_losses_usual:
            return None
        reading = Reading(self.number, _OPTIMIZER, value, None, finite=False, loss_finite=False)
        return self.context.monitors.check(reading)

    def fault_of_gradients(self) -> Fault | None:
        """The certain fault of the gradients accumulated so far; ``None`` without one. Reads from the device."""
        norm = self.meter.gradient_norm(_OPTIMIZER)
        finite = self.meter.first_bad_gradient(_OPTIMIZER) is None
        return self._fault_of(Reading(self.number, _OPTIMIZER, None, norm, finite=finite))

    def pass_over(self) -> None:
        """Leave the present update out without a record: every sample of it is known to be bad."""
        self.context.state.passed_over = True

    def drop_losses(self) -> None:
        """Forget the losses that were seen, because their micro-batches are run again."""
        self.meter.drop_early()
        self.meter.drop_losses()
        if isinstance(self.readback, RankReadback):
            self.readback.forget_told()

    def drop_last_loss(self) -> None:
        """Forget the newest loss, because its micro-batch is left out."""
        self.meter.drop_last_loss()

    def may_go_back(self, fault: Fault) -> bool:
        """Whether a rollback for a fault is allowed."""
        return self.policy.may_repeat_updates(fault, self.number, self.context.state.policy)

    def state_is_finite(self) -> bool:
        """Whether the learner is finite, so that the batch or the step is at fault."""
        return self.context.corrupt()[0] is None

    @property
    def number(self) -> int:
        """Number of the update that is about to be made."""
        return self.context.state.next_step

    def in_words(self, error: BaseException | None) -> str | None:
        """The words for an exception of ``training_step`` in a record; ``None`` without one."""
        if error is None:
            return None
        text = shortened(str(error), EXCEPTION_TEXT)
        return f"training_step raised {type(error).__name__}: {text}"

    def raised(self, words: str | None) -> None:
        """Note an exception of ``training_step`` on any rank. The next loss that is not finite stands for it.

        Args:
            words: The result of :meth:`in_words` on that rank; ``None`` without an exception.
        """
        self.context.state.raised = words

    def spoilt_since(self, snapshot: Snapshot) -> tuple[str, str]:
        """A tensor that became bad by itself since a snapshot, and how; empty if none is known."""
        context = self.context
        corrupt = context.corrupt()[0] or context.finite.spoilt_buffer(context.learner.leaves(), snapshot.leaves)
        if corrupt is not None:
            return corrupt, "is no longer finite"
        change = unexplained_change(context.learner, snapshot, context.thresholds.diagnosis.state)
        return ("", "") if change is None else (change.name, f"went from {change.before:.4g} to {change.now:.4g}")
