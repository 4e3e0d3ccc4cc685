"""Judges whether an intervention helped: a pure function of losses on the same batches with it and without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lightning_nanguard.decide.trial import lead
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Verdict


def judge_receipt(
    run: Sequence[float], without: Sequence[float], start: float | None, limits: TrialThresholds
) -> tuple[Verdict, bool, bool]:
    """Whether an intervention helped or did harm, whether it should be reversed, and whether the difference is plain.

    Args:
        run: Losses of the run, each before the update on its batch.
        without: Losses of the branch that was given up, on the same batches.
        start: Loss at the run's start; ``None`` if it is not known.
        limits: How many batches are left out of a comparison, and how much counts as a clear share.

    Example:
        >>> judge_receipt([2.0] * 8, [1.0] * 8, 3.0, TrialThresholds())
        ('cost', True, False)
    """
    gained, cost = lead(run, without, limits) > 0, lead(without, run, limits) > 0
    if not (gained or cost):
        return "no difference", False, False
    mine, other = median(run), median(without)
    learned = math.nan if start is None else start - min(mine, other)
    # As in a trial, a small difference does not count, even if it is significant.
    if learned > 0 and abs(mine - other) <= limits.lacks * learned:
        return "no difference", False, False
    plain = learned > 0 and not abs(mine - other) <= limits.plain * learned
    return ("gained", False, plain) if gained else ("cost", bool(learned > 0), plain)
