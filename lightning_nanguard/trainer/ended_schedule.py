"""Waits until it is known whether a schedule that lowered every rate almost to zero raises one again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from torch.optim import Optimizer

from lightning_nanguard.diagnosis.mistakes.observation import Observation, RateSeen
from lightning_nanguard.diagnosis.mistakes.steps import schedule_ended
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding


@final
class EndedSchedule:
    """Watches the scheduled rates after the first updates, for as many updates again.

    A schedule with restarts has rates near zero before each restart. Only the updates after them show which one it is.

    Args:
        seen: The observation of the first updates.
        optimizers: The optimizers.
        step: The number of the last of these updates.
        thresholds: When a schedule has ended.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(2)], lr=1e-6)
        >>> seen = Observation(64, rates=(RateSeen(0, 0, 0.1, 1e-6),), scheduled=True)
        >>> ended = EndedSchedule(seen, [sgd], 64, DEFAULT)
        >>> [ended.finding(step) is not None for step in (64, 127, 128, 129)]
        [False, False, True, False]
    """

    def __init__(
        self, seen: Observation, optimizers: Sequence[Optimizer], step: int, thresholds: DiagnosisThresholds = DEFAULT
    ) -> None:
        self._seen = seen
        self._optimizers = optimizers
        self._step = step
        self._thresholds = thresholds
        self.waits = schedule_ended(seen, thresholds) is not None

    def finding(self, step: int) -> Finding | None:
        """The finding, once the rates have stayed low for long enough.

        Args:
            step: The number of the present update.
        """
        if not self.waits:
            return None
        since = step - self._step
        later = replace(self._seen, rates=tuple(map(self._now, self._seen.rates)), since=since)
        found = schedule_ended(later, self._thresholds)
        self.waits = found is not None and since < self._seen.updates
        return None if self.waits else found

    def _now(self, seen: RateSeen) -> RateSeen:
        groups = self._optimizers[seen.optimizer].param_groups
        rate: Any = groups[seen.group].get("lr") if seen.group < len(groups) else None
        return replace(seen, last=float(rate)) if isinstance(rate, (int, float)) else seen
