"""Gives advice about a run: many skipped updates, a GradScaler whose scale has collapsed, a schedule that has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_nanguard.diagnosis.mistakes.observation import Observation, RateSeen
from lightning_nanguard.diagnosis.mistakes.steps import schedule_ended
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.thresholds.samples import SamplesThresholds
from lightning_nanguard.types import Finding, Intervention


@final
class SkipShare:
    """Counts skipped updates, and gives advice once if their share is large.

    Args:
        thresholds: The share at which it gives advice.

    Example:
        >>> share = SkipShare()
        >>> skipped = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
        >>> [share.note(skipped, updates) is not None for updates in (7, 20, 25, 30)]
        [False, False, True, False]
    """

    def __init__(self, thresholds: SamplesThresholds = SamplesThresholds()) -> None:
        self._limits = thresholds
        self._skipped = 0
        self._said = False

    def note(self, intervention: Intervention, updates: int) -> Finding | None:
        """Count an intervention; return advice if the share of skipped updates is now large.

        Args:
            intervention: The intervention.
            updates: Updates attempted so far.
        """
        if "skip" not in intervention.remedies or not intervention.applied:
            return None
        self._skipped += 1
        share = self._skipped / max(1, updates)
        if self._said or updates < self._limits.least_updates or share <= self._limits.skipped_share:
            return None
        self._said = True
        return Finding(
            "many_skipped_batches",
            self._limits.skipped_confidence,
            {"skipped": float(self._skipped), "updates": float(updates)},
            suggestion=(
                f"{self._skipped:,} of {updates:,} updates were skipped. If only some samples are bad, try "
                "NaNGuard(quarantine=True), which leaves them out once they are found. If the loss is a plain mean or "
                "sum over samples (not contrastive), SkipStep(keep_good_samples=True) makes the update of a bad batch "
                "from its good samples."
            ),
        )


def fallen_scales(module: Any) -> Iterator[Finding]:
    """Findings about each GradScaler among the attributes of a module whose scale is below 1.

    A scaler has to make gradients larger, so a scale below 1 is useless. It skips each step that overflows without
    calling the optimizer, so the guard sees no step.
    """
    for name, value in vars(module).copy().items():
        if not isinstance(value, GradScaler) or not value.is_enabled():
            continue
        scale = float(value.get_scale())
        if not scale < 1.0:
            continue
        yield Finding(
            "loss_scale_collapse",
            1.0,
            {"loss_scale": scale},
            f"the GradScaler in {name}",
            suggestion=(
                f"The scale of this GradScaler is {scale:.3g}. It halves its scale, and makes no update, at each step "
                "whose gradients hold Inf or NaN. Look at the losses and gradients of the newest batches. If they are "
                "finite in float32, train with bfloat16 instead of float16."
            ),
        )


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
