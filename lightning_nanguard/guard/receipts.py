"""Tests afterwards whether an intervention in a run with finite numbers helped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import final

from lightning_nanguard.decide.receipt import judge_receipt
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.guard.branch import Branch, Branches
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.control import NOT_ALIKE, Control
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.types import Fault, Reading, Verdict


@dataclass(slots=True)
class _Open:
    global_step: int
    step: int
    branch: Branch
    policy: PolicyState
    due: int
    verdicts: list[Verdict] = field(default_factory=list)
    run: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)


@final
class Receipts:
    """Trains the branch that an intervention gave up beside the run, on the same batches, and compares the two.

    One intervention is compared at a time. It is judged after a number of updates that doubles each time, until two
    verdicts in a row agree, or until the difference is plain. A trial has compared the two before. So after a trial the
    first batches are enough, if the difference on them is plain. If the branch given up is clearly better, the run
    continues from it.

    Args:
        context: Objects and settings that the parts of the guard share.
        branches: Trains the branch.
        control: Finds out whether branches make the updates of the run.
        recorder: Records that an intervention was taken back, and gives the clock.
        snapshots: Takes a new snapshot after that.
    """

    def __init__(
        self,
        context: GuardContext,
        branches: Branches,
        control: Control,
        recorder: InterventionRecorder,
        snapshots: SnapshotManager,
    ) -> None:
        self._context = context
        self._branches = branches
        self._control = control
        self._recorder = recorder
        self._snapshots = snapshots
        self._limits = context.thresholds.trial
        self._open: _Open | None = None

    def before(self, global_step: int, *, skipped: bool, tried: bool = False) -> None:
        """Keep the branch that an intervention on finite evidence is about to give up.

        Args:
            global_step: ``global_step`` of the intervention.
            skipped: Whether the intervention skips the present batch. The branch makes its update.
            tried: Whether a trial has compared the run with a better one.
        """
        self.close("another intervention was made")
        branches, state = self._branches, self._context.state
        branch: Branch | None = None
        if self._control.failed:
            self._not_measured(global_step, 0, NOT_ALIKE)
            return
        hindrance = branches.hindrance()
        if not hindrance:
            with branches.beside(state.step) as possible:
                branch = branches.of() if possible else None
                if branch is not None and skipped and branches.train(branch) is None:
                    branch = None
        if branch is None:
            self._not_measured(global_step, 0, hindrance or "a batch could not be run again, or memory is too short")
            return
        if not tried:
            self._control.begin()
        first = self._limits.updates // self._limits.judged_part if tried else self._limits.updates
        self._open = _Open(global_step, state.step, branch, state.policy, first)

    @property
    def open(self) -> bool:
        """Whether a comparison runs."""
        return self._open is not None

    def close(self, reason: str) -> None:
        """End the comparison, because it cannot be continued.

        Args:
            reason: The reason, in words.
        """
        known, self._open = self._open, None
        if known is not None:
            self._not_measured(known.global_step, self._context.state.step - known.step, reason)

    def after(self, readings: Sequence[Reading]) -> None:
        """Continue the comparison after a healthy update.

        Args:
            readings: Its readings.
        """
        known = self._open
        if known is None:
            return
        reading = readings[-1]
        if reading.step <= known.step:
            return  # a late reading from before the intervention
        if self._context.state.rolled_back_since(known.step):
            self.close("the run was rolled back again")
            return
        with self._context.replay.showing(reading.step) as shown, self._branches.beside(reading.step) as possible:
            at_hand = all(self._context.ranks.gather(shown and reading.loss is not None))
            alike = at_hand and possible and self._control.follow(reading.step)
            found = self._branches.train(known.branch) if alike else None
        if found is None or reading.loss is None:
            self.close(NOT_ALIKE if self._control.failed else "a batch could not be run again")
            return
        known.run.append(reading.loss)
        known.without.append(found)
        if len(known.run) >= known.due:
            self._compare(known)

    def _compare(self, known: _Open) -> None:
        limits, early = self._limits, known.due < self._limits.updates
        newest = -(max(known.due, limits.updates) // limits.judged_part)
        run, without = known.run[newest:], known.without[newest:]
        history = self._context.monitors.history(0)
        judged = judge_receipt(run, without, None if history is None else history.first, limits)
        known.verdicts += [] if early else [judged.verdict]
        known.due = limits.updates if early else 2 * known.due
        if not judged.plain and known.verdicts[-limits.in_a_row :] != [judged.verdict] * limits.in_a_row:
            return
        self._open = None
        receipt = Receipt(
            known.global_step,
            self._recorder.now()[0],
            judged.verdict,
            median(run),
            median(without),
            len(known.run),
            judged.take_back,
            judged.reason,
        )
        self._context.receipts.give(receipt)
        if judged.take_back:
            self._take_back(known, receipt)

    def _take_back(self, known: _Open, receipt: Receipt) -> None:
        context, state = self._context, self._context.state
        before = context.rate.effective()
        self._branches.take(known.branch)
        self._control.begin()
        context.ring.drop_pending()  # it belongs to the branch that was just left
        self._snapshots.continue_from(known.branch.state)
        self._snapshots.want()
        # Of the policy's memory only the budgets are still valid.
        spent = state.policy
        state.policy = replace(known.policy, restores=spent.restores, skips=spent.skips, trials_confirmed=0)
        message = f"the intervention of step {known.global_step} {receipt.in_words()}"
        fault = Fault("intervention_cost", "learner", "loss", receipt.loss, message)
        self._recorder.record(fault, ("take back",), before)

    def _not_measured(self, global_step: int, updates: int, reason: str) -> None:
        now = self._recorder.now()[0]
        self._context.receipts.give(Receipt(global_step, now, "not measured", updates=updates, reason=reason))
