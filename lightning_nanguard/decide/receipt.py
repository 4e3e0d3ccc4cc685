"""Judges whether an intervention helped: a pure function of losses on the same batches with it and without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple, final

from lightning_nanguard.decide.trial import lead
from lightning_nanguard.thresholds.trial import TrialThresholds
from lightning_nanguard.types import Verdict


@final
class Judged(NamedTuple):
    """The result of a comparison.

    Attributes:
        verdict: Whether the intervention helped or did harm.
        take_back: Whether it should be reversed.
        plain: Whether the difference is plain.
        reason: Why the difference does not count, in words; ``""`` if it does.
    """

    verdict: Verdict
    take_back: bool = False
    plain: bool = False
    reason: str = ""


def judge_receipt(
    run: Sequence[float], without: Sequence[float], start: float | None, limits: TrialThresholds
) -> Judged:
    """Whether an intervention helped or did harm.

    Args:
        run: Losses of the run, each before the update on its batch.
        without: Losses of the branch that was given up, on the same batches.
        start: Loss at the run's start; ``None`` if it is not known.
        limits: How many batches are left out of a comparison, and how much counts as a clear share.

    Example:
        >>> judge_receipt([2.0] * 8, [1.0] * 8, 3.0, TrialThresholds())
        Judged(verdict='cost', take_back=True, plain=False, reason='')
        >>> judge_receipt([1.0] * 8, [2.0] * 8, 51.0, TrialThresholds()).reason
        'the difference is 2 % of what has been learned since the start'
    """
    mine, other = median(run), median(without)
    # The medians have to agree, because a few batches can decide the mean of a loss with heavy tails.
    gained = lead(run, without, limits) > 0 and not mine >= other
    cost = lead(without, run, limits) > 0 and not other >= mine
    if not (gained or cost):
        return Judged("no difference", reason="neither is better on enough of them")
    learned = math.nan if start is None else start - min(mine, other)
    # As in a trial, a small difference does not count, even if it is significant.
    if learned > 0 and abs(mine - other) <= limits.lacks * learned:
        share = 100 * abs(mine - other) / learned
        return Judged(
            "no difference", reason=f"the difference is {share:.2g} % of what has been learned since the start"
        )
    plain = learned > 0 and not abs(mine - other) <= limits.plain * learned
    return Judged("gained", False, plain) if gained else Judged("cost", bool(learned > 0), plain)
