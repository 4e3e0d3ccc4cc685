"""Makes a trial: trains arms on the newest batches from an early snapshot, and undoes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import final

from lightning_nanguard.decide.trial import TrialLosses, judge_trial, share_above
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Trial


@final
class TrialRunner:
    """Finds out whether a lower rate learns what the run does not. What a trial changes is put back.

    With several processes each trains on its own batches, and all continue from the mean.

    Args:
        context: What the parts of the guard share.
        rehearsal: Runs the newest batches.
    """

    def __init__(self, context: GuardContext, rehearsal: Rehearsal) -> None:
        self._context = context
        self._rehearsal = rehearsal
        self._limits = context.thresholds.trial

    def run(self, start: Snapshot, best: Snapshot) -> Trial | None:
        """Make a trial; ``Rehearsal.kept`` is then what its best arm has learned.

        Args:
            start: The oldest certified snapshot.
            best: The certified snapshot of the lowest loss level.

        Returns:
            What it showed; ``None`` where there are too few batches, or one could not be run again.
        """
        limits, rehearsal = self._limits, self._rehearsal
        count = self._context.replay.rehearsal_batches()
        if count < limits.least_batches:
            return None
        judged = range(count - count // limits.judged_part, count)
        chosen = range(judged.start - count // limits.chosen_part, judged.start)
        trained = range(chosen.start)
        with rehearsal.present() as present:
            if present is None:
                return None

            def losses(
                base: Snapshot, factor: float, updates: int, measured: range, *, keep: bool = False
            ) -> Sequence[float] | None:
                return rehearsal.losses_after(base, factor, updates, trained, measured, keep=keep)

            before = losses(start, 1.0, 0, chosen)
            if before is None:
                return None
            arms = [(_mean(losses(start, factor, limits.picked_after, chosen)), factor) for factor in limits.factors]
            while arms[-1][0] > _mean(before) and arms[-1][1] > limits.least_factor:
                factor = arms[-1][1] * limits.factors[-1] / limits.factors[-2]
                arms.append((_mean(losses(start, factor, limits.picked_after, chosen)), factor))
            picked, factor = min(arms)
            if not picked < _mean(before):
                return Trial()  # no arm learns, so there is nothing that the run could lack
            arm = losses(start, factor, limits.updates, judged, keep=True)
            now = losses(present, 1.0, 0, judged)
            if arm is None or now is None:
                return None
            if not _mean(arm) < _mean(now):
                return Trial()
            untrained = losses(start, 1.0, 0, judged)
            level = untrained if best is start else losses(best, 1.0, 0, judged)
            later = losses(present, 1.0, limits.updates, judged)
            if untrained is None or level is None or later is None:
                return None
            trial = judge_trial(TrialLosses(untrained, level, now, later, arm, factor), limits)
            return self._refined(trial, best if trial.base == "best" else start, trained, range(chosen.start, count))

    def _refined(self, trial: Trial, base: Snapshot, trained: range, measured: range) -> Trial:
        """The trial with the best rate about that of its arm; ``Rehearsal.kept`` is what was learned at that rate."""
        limits, rehearsal = self._limits, self._rehearsal
        if trial.lacks <= limits.plain:
            return trial
        lowest: Sequence[float] | None = None
        kept, factor = rehearsal.kept, trial.factor
        for near in limits.near:
            tried = near * trial.factor
            losses = rehearsal.losses_after(base, tried, limits.updates, trained, measured, keep=True)
            # Of two rates that do equally well, the first one is nearer to what the trial has judged.
            if losses is not None and (lowest is None or share_above(lowest, losses) >= limits.signs):
                lowest, kept, factor = losses, rehearsal.kept, tried
        rehearsal.kept = kept
        return replace(trial, factor=factor)


def _mean(losses: Sequence[float] | None) -> float:
    mean = math.inf if losses is None else fmean(losses)
    return mean if math.isfinite(mean) else math.inf
