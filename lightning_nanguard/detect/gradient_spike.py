"""Detects a gradient norm far above all norms accepted so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, final

from lightning_nanguard.detect.base import AT_ONCE, Detector, Limits
from lightning_nanguard.detect.trends import spread
from lightning_nanguard.detect.window import Window
from lightning_nanguard.errors import require
from lightning_nanguard.thresholds.detection import SpikeThresholds
from lightning_nanguard.types import Fault, Reading


@final
class GradientSpike(Detector):
    """Detects a gradient norm far above all norms accepted so far.

    It compares the logarithm of the norm by median and MAD (median absolute deviation), so that heavy tails and slow
    drifts are no fault. A spike is more than ``threshold`` deviations above the median, ``ratio`` times the median, ten
    times the largest norm in the window, and twice the largest norm of the first ``warmup`` readings. The last
    condition is for a loss that has fallen nearly to 0: if the data change then, the norm rises far above its median,
    but only to the size it had at the start.

    Args:
        threshold: Deviations (MAD, scaled) of the logarithm above its median.
        ratio: Least ratio to the median.
        window: Number of accepted norms that the detector compares with.
        warmup: Number of accepted norms before these limits apply. Until then, only a norm a million times the largest
            one is a spike.
        thresholds: Further thresholds, ``None`` for the defaults.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        threshold: float = 12.0,
        ratio: float = 200.0,
        window: int = 128,
        warmup: int = 20,
        *,
        thresholds: SpikeThresholds | None = None,
    ) -> None:
        require(threshold > 0, self, "threshold", threshold, "a number above 0")
        require(ratio > 1, self, "ratio", ratio, "a number above 1")
        require(warmup >= 4, self, "warmup", warmup, "an integer of at least 4")
        require(window >= warmup, self, "window", window, f"an integer of at least warmup={warmup}")
        self.threshold = threshold
        self.ratio = ratio
        self.window = window
        self.warmup = warmup
        self.thresholds = thresholds or SpikeThresholds()
        self._norms = Window(window)
        self._first = Window(warmup)
        self._newest = 0.0
        # The largest norm of the whole run. A rollback does not lower it.
        self._largest = 0.0

    def check(self, reading: Reading) -> Fault | None:
        """The fault of this reading, or ``None``."""
        norm = reading.grad_norm
        if norm is None or not reading.finite:
            return None
        first = self._first_of_all(norm) if len(self._norms) == 2 else None
        return first or self._spike(norm)

    def _first_of_all(self, norm: float) -> Fault | None:
        # The first norm can only be compared with the two after it. By then its update has changed weights and
        # optimizer state.
        first, second = self._norms.values()
        others = max(second, norm)
        if first <= self.thresholds.warmup_above_largest * others:
            return None
        message = (
            f"the gradient norm of the first batch was {first:.3g}, and that of the next two at most {others:.3g}: the "
            "first batch may have made weights and optimizer state bad"
        )
        return Fault("gradient_spike", "state", "gradient", first, message, certain=False, clipping_helps=True)

    def _spike(self, norm: float) -> Fault | None:
        # A cheap test first: every limit is at least this many times any norm in the window.
        if norm <= self.thresholds.above_largest * self._newest:
            return None
        doubtful = not norm > self._find_limit()
        # During warm-up a high norm may be normal, so it counts only if its batch is strange.
        warming_up = 0 < len(self._norms) < self.warmup
        stands_out = warming_up and norm > self.thresholds.warmup_doubtful * max(self._norms.values())
        if doubtful and not stands_out:
            return None
        usual = median(self._norms.values())
        message = (
            f"the gradient norm is {norm:.3g}, {norm / usual:.3g} times its median of {usual:.3g}"
            if usual > 0
            else f"the gradient norm is {norm:.3g}, and was 0 in the updates before"
        )
        return Fault(
            "gradient_spike",
            "batch",
            "gradient",
            norm,
            message,
            doubtful,
            certain=False,
            extreme=norm > self.thresholds.extreme * self._largest > 0,
            clipping_helps=True,
        )

    def limits(self) -> Limits:
        """Any loss, and ten times the newest norm: a spike exceeds ten times the largest norm in the window."""
        # The newest norm has to stay in the window for as long as the limits hold.
        holds = len(self._norms) > 2 and self.window >= AT_ONCE
        return Limits(math.inf, self.thresholds.above_largest * self._newest if holds else -math.inf)

    def accept(self, reading: Reading) -> None:
        """Add a healthy norm to the window."""
        norm = reading.grad_norm
        if norm is None or not reading.finite:
            return
        self._norms.append(reading.step, norm)
        if len(self._first) < self.warmup:
            self._first.append(reading.step, norm)
        self._newest = norm
        self._largest = max(self._largest, norm)

    def _find_limit(self) -> float:
        own = self.thresholds
        norms = [norm for norm in self._norms.values() if norm > 0]
        if len(norms) < self.warmup:
            return own.warmup_above_largest * max(norms, default=math.inf)
        logs = [math.log(norm) for norm in norms]
        by_deviation = median(logs) + self.threshold * max(spread(logs), own.min_deviation)
        by_ratio = math.log(self.ratio) + median(logs)
        by_largest = math.log(own.above_largest) + max(logs)
        limit = max(by_deviation, by_ratio, by_largest)
        by_first = own.above_first * max(self._first.values(), default=0.0)
        # The largest float64 is about e^709.
        return max(math.exp(limit), by_first) if limit < 700 else math.inf

    def rewind(self, step: int) -> None:
        """Forget the norms accepted after ``step``."""
        self._norms.rewind(step)
        self._first.rewind(step)
        self._newest = next(iter(self._norms.last(1)), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The history in plain containers."""
        return {"norms": self._norms.state(), "first": self._first.state(), "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._norms.load(state["norms"])
        self._first.load(state.get("first", ()))
        known = [*self._norms.values(), *self._first.values()]
        self._largest = float(state.get("largest", max(known, default=0.0)))
        self._newest = next(iter(self._norms.last(1)), 0.0)
