"""Makes the record of each intervention, and the error that ends a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.loop import Clock, TrainingLoop
from lightning_nanguard.record.summary import stop_message
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.types import Fault, Finding, Intervention


@final
class InterventionRecorder:
    """Makes the record of each intervention, and the error that ends a run.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Stores records, and gives ``global_step``, epoch and batch index (the clock).
        memory: Number of batches whose clock is stored.
    """

    def __init__(self, context: GuardContext, loop: TrainingLoop, *, memory: int) -> None:
        self._context = context
        self._loop = loop
        # The clock at the end of each of the newest batches, with the number of its last update.
        self._clocks: deque[tuple[int, Clock]] = deque(maxlen=memory)
        self._tried: deque[str] = deque(maxlen=NUMBERS_PER_MESSAGE)
        # ``global_step`` at the last rollback, and that of its snapshot.
        self._restored = -1, -1
        # For each kind of fault at each place, the finding with the highest confidence.
        self._surest: dict[tuple[str, str], Finding] = {}
        # Names what lies on disk, in lines: the last good checkpoint, and the command that tells the run.
        self.on_disk: Callable[[], str] = str

    def mark(self) -> None:
        """Store the clock of the batch that ends, for faults that are found late."""
        self._clocks.append((self._context.state.step, self._loop.clock()))

    def clock(self, late: int | None = None, *, unmade: bool = True) -> Clock:
        """The clock for a record.

        Args:
            late: Number of the update, if its reading was late. Its record has the clock of its own batch, if this is
                stored.
            unmade: Whether the present update is still to be made. A record has the step after its update.
        """
        now = self._loop.clock()
        if late is not None:
            return next((clock for last, clock in self._clocks if last >= late), now)
        global_step, epoch, batch_idx = now
        return global_step + unmade, epoch, batch_idx

    def record(
        self,
        fault: Fault,
        words: tuple[str, ...],
        before: Sequence[float],
        finding: Finding | None = None,
        ranks: tuple[int, ...] = (),
        clock: Clock | None = None,
        restored: Snapshot | None = None,
        made: int = 0,
    ) -> None:
        """Record what was done.

        Args:
            fault: The fault.
            words: What was done.
            before: Effective learning rates before it.
            finding: The cause of the fault.
            ranks: Ranks that saw it, if not all of them did.
            clock: The clock of the fault; ``None`` for now.
            restored: The snapshot that was restored; ``None`` if none was.
            made: Updates that were made since it by the arm from which the run continues.
        """
        global_step, epoch, batch_idx = self._loop.clock() if clock is None else clock
        self._note_finding(fault, finding)
        after = self._context.rate.effective()
        kept = restored is None or "redo" in words
        self._loop.record(
            Intervention(
                global_step=global_step,
                epoch=epoch,
                batch_idx=batch_idx,
                fault=fault.kind,
                place=fault.place,
                remedies=words,
                lr_before=before[0] if before else None,
                lr_after=after[0] if after else None,
                snapshot_step=None if restored is None else restored.global_step,
                cause=None if finding is None else finding.cause,
                finding=finding,
                message=fault.message,
                value=fault.value,
                applied=not self._context.settings.observe,
                ranks=ranks,
                updates_lost=0
                if kept or restored is None
                else max(0, self._updates_since(restored, global_step) - made),
                restart_updates=0 if restored is None else made,
            )
        )

    def _updates_since(self, snapshot: Snapshot, global_step: int) -> int:
        now = max(global_step, self._loop.clock()[0])  # a late fault is recorded under its own step
        after, of = self._restored
        self._restored = now, snapshot.global_step
        if after > snapshot.global_step:
            return now - after + max(0, of - snapshot.global_step)  # the others were undone before
        # LBFGS and SAM compute several gradients for one step, and each of them is measured. Lightning does not count
        # the steps of a bare torch optimizer.
        return now - snapshot.global_step or self._context.state.step - snapshot.step

    def note(self, fault: Fault, *words: str) -> None:
        """Record what was done outside the order of a step."""
        self.record(fault, words, self._context.rate.effective())

    def _note_finding(self, fault: Fault, finding: Finding | None) -> None:
        key = fault.kind, fault.place
        known = self._surest.get(key)
        if finding is not None and (known is None or finding.confidence >= known.confidence):
            self._surest[key] = finding

    def best_finding(self, fault: Fault) -> Finding | None:
        """The finding with the highest confidence about faults like this one, else about any fault of the run."""
        here = self._surest.get((fault.kind, fault.place))
        return here or max(self._surest.values(), key=lambda finding: finding.confidence, default=None)

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {"tried": list(self._tried), "restored": list(self._restored)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; checkpoints of version 0.1.0 lack this."""
        self._tried.extend(state.get("tried", ()))
        after, of = state.get("restored", self._restored)
        self._restored = int(after), int(of)

    def tried(self, fault: Fault, words: tuple[str, ...]) -> None:
        """Store what was done, for the error that may end the run later."""
        self._tried.append(f"{fault.kind}: {', '.join(words)}")

    def stop(
        self,
        fault: Fault,
        reason: str,
        finding: Finding | None,
        clock: Clock,
        restored: Snapshot | None = None,
        limit: str = "",
    ) -> NoReturn:
        """End the run. The error names the surest cause of faults like the last one, else of any fault.

        Args:
            fault: The fault.
            reason: Why the run cannot go on.
            finding: The cause of the fault.
            clock: The clock of the fault.
            restored: The snapshot that was restored; ``None`` if none was.
            limit: The limit of the budget that ended the run; empty if none did.

        Raises:
            TrainingDivergedError: Always.
        """
        self._note_finding(fault, finding)
        best = self.best_finding(fault)
        if finding is None or best is None or best.cause == finding.cause or not best.samples:
            finding = best  # otherwise the surest one names samples of another batch, and this fault has its own cause
        to = None if restored is None else restored.global_step
        raise TrainingDivergedError(
            stop_message(reason, fault, clock, finding, self._tried, to, limit=limit, on_disk=self.on_disk()),
            fault=fault,
            reason=reason,
            tried=tuple(self._tried),
            snapshot_step=to,
            finding=finding,
        )
