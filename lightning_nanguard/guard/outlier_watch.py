"""Gives advice about a loss, a gradient norm or a learning rate of one update that is far from those around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lightning_nanguard.detect.outliers import Outlier, OutlierSearch, ranges_off, times_above, times_off
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.types import Finding, Reading


@final
class OutlierWatch:
    """Gives advice about a loss, a gradient norm or a learning rate of one update that is far from those around it.

    The update was finite, and it was made. So nothing is done about it, and the user is told once of each kind.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Takes the advice.
    """

    def __init__(self, context: GuardContext, loop: TrainingLoop) -> None:
        self._context = context
        self._loop = loop
        self._limits = context.thresholds.detection.outlier
        # By optimizer; rates also by group.
        self._losses: dict[int, OutlierSearch] = {}
        self._norms: dict[int, OutlierSearch] = {}
        self._rates: dict[tuple[int, int], OutlierSearch] = {}

    def see_rates(self, optimizer_index: int) -> None:
        """Take the learning rates of the update that an optimizer is about to make."""
        limits, step = self._limits, self._context.state.step
        for number, group in enumerate(self._context.learner.optimizers[optimizer_index].param_groups):
            rate, key = group.get("lr"), (optimizer_index, number)
            if not isinstance(rate, float):
                continue  # a tensor may be on a device, which would have to be waited for
            rate = self._context.rate.valid.rate(group, rate)
            search = self._rates.get(key)
            if search is None:
                far = times_off(limits.rate, limits.steady)
                search = self._rates[key] = OutlierSearch(far, before=limits.rates, least=0, after=limits.rates)
            found = search.add(step, rate)
            if found is not None:
                name = f"learning rate of group {number}"
                self._advise("learning_rate_outlier", name, found, "Look at what sets the rate")

    def after(self, readings: Sequence[Reading]) -> None:
        """Take healthy readings of the batch that has just ended."""
        if self._context.state.healthy_since_restore == 1:
            self._losses.clear()  # the readings before belong to another state
            self._norms.clear()
        for reading in readings:
            index, loss, norm = reading.optimizer_index, reading.loss, reading.grad_norm
            if index not in self._losses:
                self._begin(index)
            one = None if norm is None else self._norms[index].add(reading.step, norm)
            other = None if loss is None else self._losses[index].add(reading.step, loss)
            if one is not None:
                self._advise("gradient_spike", "gradient", one, "Look at the batch of that update")
            elif other is not None and other.distance > self._context.monitors.loss_unit():
                self._advise("loss_outlier", "loss", other, "Look at the batch of that update")

    def _begin(self, index: int) -> None:
        limits = self._limits
        window = {"before": limits.before, "least": limits.least, "after": limits.after}
        self._losses[index] = OutlierSearch(ranges_off(limits.loss_above, limits.loss_below), **window)
        self._norms[index] = OutlierSearch(times_above(limits.norm), **window)

    def _advise(self, cause: str, place: str, found: Outlier, advice: str) -> None:
        suggestion = (
            f"the {place} of update {found.step} was {found.value:.4g}, and between {found.lowest:.4g} and "
            f"{found.highest:.4g} in the updates before and after it. {advice}: it is finite, so nothing was changed."
        )
        confidence = self._context.thresholds.diagnosis.confidence.suspicion
        evidence = {"value": found.value, "lowest": found.lowest, "highest": found.highest}
        self._loop.advise(Finding(cause, confidence, evidence, place, suggestion=suggestion))
