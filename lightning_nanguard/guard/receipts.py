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
@dataclass(eq=False)
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

    context: GuardContext
    branches: Branches
    control: Control
    recorder: InterventionRecorder
    snapshots: SnapshotManager
    _open: _Open | None = field(default=None, init=False)

    def before(self, global_step: int, *, skipped: bool, tried: bool = False) -> None:
        """Keep the branch that an intervention on finite evidence is about to give up.

        Args:
            global_step: ``global_step`` of the intervention.
            skipped: Whether the intervention skips the present batch. The branch makes its update.
            tried: Whether a trial has compared the run with a better one.
        """
        branches, state = self.branches, self.context.state
        if skipped and self._skips_with(global_step):
            return
        self.close("another intervention was made")
        branch: Branch | None = None
        if self.control.failed:
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
            self.control.begin()
        limits = self.context.thresholds.trial
        first = limits.updates // limits.judged_part if tried else limits.updates
        self._open = _Open(global_step, state.step, branch, state.policy, first)

    def _skips_with(self, global_step: int) -> bool:
        """Whether a comparison runs that shows what this skipped batch costs, too: its branch makes the update."""
        known, step = self._open, self.context.state.step
        if known is None or self.context.state.rolled_back_since(known.step):
            return False
        with self.branches.beside(step) as possible:
            if not possible or self.branches.train(known.branch) is None:
                return False
        self._not_measured(global_step, 0, f"it is compared together with the intervention of step {known.global_step}")
        return True

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
            self._not_measured(known.global_step, self.context.state.step - known.step, reason)

    def after(self, readings: Sequence[Reading]) -> None:
        """Continue the comparison after a healthy update."""
        known = self._open
        if known is None:
            return
        reading = readings[-1]
        if reading.step <= known.step:
            return  # a late reading from before the intervention
        if self.context.state.rolled_back_since(known.step):
            self.close("the run was rolled back again")
            return
        with self.context.replay.showing(reading.step) as shown, self.branches.beside(reading.step) as possible:
            at_hand = all(self.context.ranks.gather(shown and reading.loss is not None))
            alike = at_hand and possible and self.control.follow(reading.step)
            found = self.branches.train(known.branch) if alike else None
        if found is None or reading.loss is None:
            self.close(NOT_ALIKE if self.control.failed else "a batch could not be run again")
            return
        known.run.append(reading.loss)
        known.without.append(found)
        if len(known.run) >= known.due:
            self._compare(known)

    def _compare(self, known: _Open) -> None:
        limits = self.context.thresholds.trial
        early = known.due < limits.updates
        newest = -(max(known.due, limits.updates) // limits.judged_part)
        run, without = known.run[newest:], known.without[newest:]
        judged = judge_receipt(run, without, self.context.monitors.history(0).first, limits)
        known.verdicts += [] if early else [judged.verdict]
        known.due = limits.updates if early else 2 * known.due
        if not judged.plain and known.verdicts[-limits.in_a_row :] != [judged.verdict] * limits.in_a_row:
            return
        self._open = None
        receipt = Receipt(
            known.global_step,
            self.recorder.clock(unmade=False)[0],
            judged.verdict,
            median(run),
            median(without),
            len(known.run),
            judged.take_back,
            judged.reason,
        )
        self.context.receipts.give(receipt)
        if judged.take_back:
            self._take_back(known, receipt)

    def _take_back(self, known: _Open, receipt: Receipt) -> None:
        context, state = self.context, self.context.state
        before = context.rate.effective()
        self.branches.take(known.branch)
        self.control.begin()
        context.ring.drop_pending()  # it belongs to the branch that was just left
        self.snapshots.continue_from(known.branch.state)
        self.snapshots.want()
        # Of the policy's memory only the budgets are still valid.
        spent = state.policy
        state.policy = replace(known.policy, restores=spent.restores, skips=spent.skips, trials_confirmed=0)
        message = f"the intervention of step {known.global_step} {receipt.in_words()}"
        fault = Fault("intervention_cost", "learner", "loss", receipt.loss, message)
        self.recorder.record(fault, ("take back",), before)

    def _not_measured(self, global_step: int, updates: int, reason: str) -> None:
        now = self.recorder.clock(unmade=False)[0]
        self.context.receipts.give(Receipt(global_step, now, "not measured", updates=updates, reason=reason))
