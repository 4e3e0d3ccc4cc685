"""A trial that has begun: its arms, their losses so far, and which arm these losses choose."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, final

from lightning_nanguard.decide.trial import lead, pick_arm
from lightning_nanguard.guard.branch import Branch
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Fault


@final
@dataclass(slots=True)
class Arm:
    """One arm of a trial.

    Attributes:
        factor: Factor on the rate of the run.
        branch: The state that is trained.
        losses: Its losses so far, one for each update.
    """

    factor: float
    branch: Branch
    losses: list[float] = field(default_factory=list)

    @property
    def from_best(self) -> bool:
        """Whether it continues from the best snapshot, at the present rate."""
        return self.factor == 1


@final
@dataclass(slots=True)
class ArmComparison:
    """A comparison of an arm with the states on the newest batches, up to the update at which it is judged.

    Attributes:
        arm: The arm.
        batches: Number of batches.
        limits: What the comparison has to show.
        final: Whether the trial ends with it.
        under: Losses so far under each of the states, and those of the run.
        open: Whether the arm leads so far. Half of the batches show it.
    """

    arm: Arm
    batches: int
    limits: TrialThresholds
    final: bool
    under: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    open: bool = True

    @property
    def over(self) -> bool:
        """Whether all batches are compared, or the trial ends because the arm does not lead."""
        complete = self.open and len(self.under["later"]) == self.batches
        return complete or (self.final and not self.open)

    def add(self, name: str, loss: float) -> None:
        """Add the loss of the newest batch under a state."""
        known = self.under[name]
        known.append(loss)
        if name != "best" and 2 * len(known) >= self.batches:  # the run may have lost what it had learned in the best
            self.open &= lead(self.arm.losses[-len(known) :], known, self.limits) > 0


@final
@dataclass(slots=True)
class RunningTrial:
    """A trial that has begun, with the losses so far.

    Attributes:
        fault: The suspicion that the trial tests.
        begun: The update after which it began.
        begun_step: ``global_step`` at its beginning.
        rate: State of the learning-rate multiplier at its beginning.
        states: The states compared with the arm on the last batches: the start, the best one and the present one.
        arms: The arms. After the pick only the best ones.
        limits: When arms are picked and compared, and what a comparison has to show.
        before: Updates that an earlier trial made from the start, if the arms continue from its arm.
        updates: Updates of each arm.
        earlier: For some batches from before the trial, the functions that give their losses.
        during: The same for some batches spread over the trial.
        start: Losses under the start, before the pick.
        comparison: The present comparison; ``None`` before the first one.
    """

    fault: Fault
    begun: int
    begun_step: int
    rate: Mapping[str, Any]
    states: dict[str, Snapshot]
    arms: list[Arm]
    limits: TrialThresholds
    before: int = 0
    earlier: Sequence[Callable[[], float | None]] = ()
    updates: int = 0
    during: list[Callable[[], float | None]] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    comparison: ArmComparison | None = None

    @property
    def measures_start(self) -> bool:
        """Whether the loss of the newest batch under the start is needed, to compare the best arm with it."""
        left = self.limits.picked_after - self.updates
        return 0 <= left < self._judged(self.limits.picked_after) and not self.before

    def pick(self) -> list[float]:
        """Keep the best arms; return lower factors to try, too, if even the best arm raises the loss."""
        limits, restarts = self.limits, self._restarts()
        newest = limits.picked_after // 2

        def level(arm: Arm) -> float:
            return _mean(arm.losses[-newest:])

        best, lowest = min(restarts, key=level), min(arm.factor for arm in restarts)
        nearest = sorted(restarts, key=lambda arm: (arm.factor > best.factor, abs(math.log(arm.factor / best.factor))))
        ahead = [arm for arm in self.arms if arm.from_best and level(arm) < level(best)]
        self.arms = [*nearest[: limits.picked], *ahead]
        # A continued arm has shown that it learns.
        learns = bool(self.before or ahead)
        if learns or lowest <= limits.least_factor or not self._raises_the_loss(best):
            return []
        return [lowest * factor for factor in limits.factors]

    def extend(self, more: Sequence[Arm]) -> None:
        """Add arms, and pick again. In ordered data it may be the newest batches that raise the loss of the others."""
        self.arms += more
        self.updates, self.start = 0, []

    def compare_if_due(self, first: float | None) -> None:
        """Begin the comparison that ends at half of the updates, or the one that ends with the trial, if it is due.

        Args:
            first: First loss of the run; ``None`` if it is not known.
        """
        for end in (self.limits.updates // 2, self.limits.updates):
            # Decide by other batches than those that the arm is picked by.
            batches = self._judged(end)
            if self.updates == end - batches + 1:
                arm = self._best(self.arms, slice(-batches - 1, -1), first)
                final = end == self.limits.updates
                # In ordered data a few batches may all be of a kind. So more of them are left out before the end.
                strict = self.limits if final else replace(self.limits, left_out=self.limits.left_out_early)
                self.comparison = ArmComparison(arm, batches, strict, final)

    def best_now(self, first: float | None) -> Arm:
        """The best restart on the newest batches, at whose rate to go on: a higher rate may have caught up.

        Args:
            first: First loss of the run; ``None`` if it is not known.
        """
        return self._best(self._restarts(), slice(-self._judged(self.updates), None), first)

    def is_best(self, arm: Arm) -> bool:
        """Whether an arm is better than all others, so that its rate is clearly the right one of those tried."""
        newest = slice(-self._judged(self.updates), None)
        others = (one for one in self.arms if one is not arm)
        return all(lead(arm.losses[newest], other.losses[newest], self.limits) > 0 for other in others)

    def _restarts(self) -> list[Arm]:
        return [arm for arm in self.arms if not arm.from_best]

    def _best(self, arms: Sequence[Arm], part: slice, first: float | None) -> Arm:
        levels = [_mean(arm.losses[part]) for arm in arms]
        return arms[pick_arm([arm.factor for arm in arms], levels, first, self.limits)]

    def _raises_the_loss(self, arm: Arm) -> bool:
        """Whether an arm that began at the start is worse than the start on the newest batches."""
        newest = slice(-self._judged(self.limits.picked_after), None)
        return lead(self.start[newest], arm.losses[newest], self.limits) > 0

    def _judged(self, updates: int) -> int:
        return updates // self.limits.judged_part


def _mean(losses: Sequence[float]) -> float:
    mean = fmean(losses)
    return mean if math.isfinite(mean) else math.inf
