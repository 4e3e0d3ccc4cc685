"""Records steps that were made again, and steps that were made from a part of their data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.guard.rank_readback import Readback
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.types import Evidence, Fault, Finding


@final
@dataclass(eq=False)
class StepRecords:
    """Records what a loop did about a bad step before the guard saw its update.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Finds causes.
        recorder: Makes the records.
        policy: Counts repeated updates.
        readback: Forgets readings of undone states.
    """

    context: GuardContext
    loop: TrainingLoop
    recorder: InterventionRecorder
    policy: Policy
    readback: Readback
    # How often the fault at a place was gone when its step was made again.
    _transient: Counter[str] = field(default_factory=Counter, init=False)

    def diagnosis(self, fault: Fault) -> Finding | None:
        """The cause of a fault of the present update."""
        state = self.context.state
        known = Evidence(step=state.next_step, healthy_steps=state.healthy_steps)
        return self.loop.diagnose(fault, known, "replay", state.next_step)

    def transient(
        self,
        fault: Fault,
        *,
        spoilt: tuple[str, str] = ("", ""),
        since: Snapshot | None = None,
        late: int | None = None,
        counters: Sequence[str] = (),
        ranks: tuple[int, ...] = (),
    ) -> None:
        """Record that a fault was gone when its step was made again.

        Args:
            fault: The fault.
            spoilt: The tensor that had become bad, and how.
            since: The snapshot from which all updates were made again, because the state had become bad by itself;
                ``None`` if only the step was made again.
            late: Number of the bad update, if its reading arrived after it was made.
            counters: Attributes that had to be reset for the fault to go.
            ranks: The ranks that saw the fault, if not all did.
        """
        state = self.context.state
        if since is not None:
            state.policy = self.policy.count_repeated_updates(fault, state.next_step, state.policy)
            self.readback.clear()  # they belong to undone states, like the pending snapshot
            self.context.ring.drop_pending()
        tensor, how = spoilt
        if tensor:
            fault = replace(fault, place=tensor)
        self._transient[fault.place] += 1
        times = self._transient[fault.place]
        again = "the step was made again from its own state, batch and random numbers"
        if since is not None:
            what = f"{tensor} {how} by itself; " if tensor else ""
            again = f"{what}the updates since the snapshot at update {since.step} were made again from their own data"
        suggestion = f"{again}, and the fault was gone. Nothing, unless it keeps happening."
        if counters:
            names = ", ".join(counters[:NUMBERS_PER_MESSAGE])
            suggestion = f"The fault depends on what the step itself changes: look at how {names} is used."
        elif times >= self.context.thresholds.batches.repeated.test_device:
            suggestion = f"{again}, and the fault was gone. It keeps happening at this place: test the device."
        cause = "corrupted_state" if tensor else "transient"
        confidence = self.context.thresholds.diagnosis.confidence.transient
        finding = Finding(cause, confidence, {"times": float(times)}, fault.place, suggestion=suggestion)
        words = ("redo",) if since is None else ("restore", "redo")
        self._record(fault, *words, finding=finding, ranks=ranks, restored=since, late=late)

    def left_out(self, fault: Fault, finding: Finding | None, ranks: tuple[int, ...] = ()) -> None:
        """Record that a bad micro-batch was left out, and the update is made from the others of its window.

        Args:
            fault: The fault.
            finding: The cause.
            ranks: The ranks of the micro-batch, if there are several.
        """
        self._record(fault, "leave out", finding=finding, ranks=ranks)

    def kept_good_samples(self, fault: Fault, finding: Finding | None) -> None:
        """Record that an update is made from the good samples of a bad batch."""
        self._record(fault, "keep good samples", finding=finding)

    def undone(self, fault: Fault, finding: Finding | None) -> None:
        """Record that a batch from which no update was made, was undone."""
        self.recorder.record(fault, ("undo",), self.context.rate.effective(), finding)

    def _record(
        self,
        fault: Fault,
        *words: str,
        finding: Finding | None,
        ranks: tuple[int, ...] = (),
        restored: Snapshot | None = None,
        late: int | None = None,
    ) -> None:
        rates, clock = self.context.rate.effective(), self.recorder.clock(late)
        self.recorder.record(fault, words, rates, finding, ranks, clock, restored)
        self.recorder.tried(fault, words)
