"""Gives advice about finite numbers that stand out: of one update, or of an average that is larger than all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from lightning_nanguard.detect.outliers import Outlier, OutlierSearch, ranges_below, times_above, times_off
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.loop import TrainingLoop
from lightning_nanguard.state.learner import StateKey, unwrapped
from lightning_nanguard.state.plausibility import first_jump
from lightning_nanguard.state.restore import average_of
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Finding, Reading


@final
class OutlierWatch:
    """Gives advice about a loss, a gradient norm or a learning rate of one update that is far from those around it.

    The update was finite, and it was made. So nothing is done about it, and the user is told once of each kind. The
    same holds for an averaged copy that is larger than the weights ever were, which no average of them can be.

    Args:
        context: Objects and settings that the parts of the guard share.
        loop: Takes the advice.
    """

    def __init__(self, context: GuardContext, loop: TrainingLoop) -> None:
        self._context = context
        self._loop = loop
        self._limits = context.thresholds.detection.outlier
        # By optimizer.
        self._losses: dict[int, OutlierSearch] = {}
        self._norms: dict[int, OutlierSearch] = {}
        self._rates: dict[int, OutlierSearch] = {}
        # The newest snapshot whose averages were compared, and the largest squared norm that each average may have.
        self._compared = -1
        self._largest: dict[StateKey, float] = {}
        # The sizes of untrained parameters in that snapshot, and the parts of the module that such have moved in.
        self._before: dict[StateKey, float] = {}
        self._moving: set[StateKey] = set()

    def see_rates(self, optimizer_index: int) -> None:
        """Take the learning rate of the first group of an optimizer that is about to step."""
        group = self._context.learner.optimizers[optimizer_index].param_groups[0]
        if not isinstance(rate := group.get("lr"), float):
            return  # a tensor may be on a device, which would have to be waited for
        limits = self._limits
        search = self._rates.get(optimizer_index)
        if search is None:
            far = times_off(limits.rate, limits.steady)
            search = OutlierSearch(far, before=limits.after, least=0, after=limits.after)
            self._rates[optimizer_index] = search
        found = search.add(self._context.state.step, self._context.rate.valid.rate(group, rate))
        if found is not None:
            self._advise("learning_rate_outlier", "learning rate of group 0", found, "Look at what sets the rate")

    def after(self, readings: Sequence[Reading]) -> None:
        """Take healthy readings of the batch that has just ended."""
        if self._context.state.healthy_since_restore == 1:
            for search in (*self._losses.values(), *self._norms.values()):
                search.clear()  # the readings before belong to another state
        for reading in readings:
            index, loss, norm = reading.optimizer_index, reading.loss, reading.grad_norm
            if not reading.finite:
                continue  # an overflow, which a GradScaler has skipped
            if index not in self._losses:
                self._begin(index)
            one = None if norm is None else self._norms[index].add(reading.step, norm)
            other = None if loss is None else self._losses[index].add(reading.step, loss)
            if one is not None:
                self._advise("gradient_spike", "gradient", one, "Look at the batch of that update")
            elif other is not None and self._shows_more_than_size(other):
                self._advise("loss_outlier", "loss", other, "Look at the batch of that update")

        newest = self._context.ring.last_certified
        if newest is not None and newest.step != self._compared:
            self._compared = newest.step
            self._compare_averages(newest)
            self._compare_statistics(newest)

    def finish(self) -> None:
        """Look at the last updates of the run: a gradient norm or a learning rate far above those before it."""
        limits, newest = self._limits, self._context.ring.last_certified
        if newest is not None and not self._context.many:
            self._tell_of_statistics(dict(self._context.learner.weights()), newest)
        for norms in self._norms.values():
            if (found := norms.at_end(times_above(limits.norm))) is not None:
                self._advise("gradient_spike", "gradient", found, "Look at the batch of that update")
        for rates in self._rates.values():
            if (found := rates.at_end(times_above(limits.rate))) is not None:
                self._advise("learning_rate_outlier", "learning rate of group 0", found, "Look at what sets the rate")

    def _shows_more_than_size(self, loss: Outlier) -> bool:
        # A sum over samples is lower in a smaller batch, such as the last one of an epoch.
        far = loss.distance > self._context.monitors.loss_unit()
        return far and not self._context.replay.sizes_vary(self._limits.after + 1)

    def _compare_averages(self, snapshot: Snapshot) -> None:
        learner, typical = self._context.learner, snapshot.typical
        pairs = {key: ("parameter", unwrapped(key[-1])) for key in typical if key[0] == "average"}
        untrained, before = learner.untrained(), self._before
        self._before = {key: typical[key] for key in untrained if key in typical}
        # A part that never changes is no average.
        self._moving |= {untrained[key] for key, size in self._before.items() if before.get(key, size) != size}
        for _, name in self._moving:
            pairs |= learner.copies(name, untrained)
        squares: dict[StateKey, list[float]] = {}
        for key, weight in pairs.items():
            leaf, part = snapshot.leaves.get(key), average_of(key, untrained)
            if part is not None and key in typical and weight in typical and isinstance(leaf, Tensor):
                sums = squares.setdefault(part, [0.0, 0.0, 0.0])
                for index, size in enumerate((typical[key], typical[weight], before.get(key, 0.0))):
                    sums[index] += leaf.numel() * size**2
        for part, (average, weights, begun) in squares.items():
            # Copies elsewhere are averages of the same weights. One inside the module may have begun as another model.
            about, first = (part, max(weights, begun)) if part[0] == "untrained" else (("average",), weights)
            most = self._largest[about] = max(self._largest.get(about, first), weights)
            if average > self._limits.average**2 * most > 0:
                norm, limit = math.sqrt(average), math.sqrt(most)
                place = part[1] if part[0] == "untrained" else f"the averaged copy of {part[1]}"
                suggestion = (
                    f"the norm of {place} is {norm:.4g}, and that of the weights was never above {limit:.4g}: it is no "
                    "average of them. Look at the code that writes to it, and whether its decay is below 1. Nothing "
                    "was changed."
                )
                self._say("average_too_large", place, suggestion, norm=norm, most=limit)

    def _compare_statistics(self, snapshot: Snapshot) -> None:
        """Compare running statistics with those of the snapshot before, if their norms allow that one has grown far."""
        if len(self._context.ring.certified) < 2:
            return
        before, limits = self._context.ring.certified[1], self._context.thresholds.snapshots.plausibility
        grown: dict[StateKey, Any] = {}
        for key, size in snapshot.typical.items():
            leaf, then = snapshot.leaves.get(key), before.typical.get(key, math.inf)
            # The size of a variance is that of its root.
            if key[0] == "buffer" and isinstance(leaf, Tensor):
                most = leaf.numel() * max(size, size**2)
                grown |= {key: leaf} if most > limits.state_growth * max(then, limits.least_magnitude) else {}
        if grown:
            self._tell_of_statistics(grown, before)

    def _tell_of_statistics(self, now: Mapping[StateKey, Any], before: Snapshot) -> None:
        """Tell of running statistics that have grown as far as the guard acts on if it acts on evidence."""
        context, limits = self._context, self._context.thresholds.snapshots.plausibility
        # At first they come from their initial values.
        if context.settings.act_on != "certain" or before.step <= limits.settled_after:
            return
        before.wait()
        keys = [key for key in context.learner.statistics(now) if key[0] == "buffer"]
        far = first_jump(now, before.leaves, keys, limits.state_growth, limits.least_magnitude)
        if far is not None:
            suggestion = (
                f"{far} became more than {limits.state_growth:,.0f} times as large, although no loss or gradient was "
                "bad, and in evaluation the module normalises by it. Look for a batch with numbers far out of range: "
                "in training, normalisation hides them. Nothing was changed. "
                'NaNGuard(act_on="evidence") would restore it.'
            )
            self._say("statistics_too_large", far, suggestion, times=limits.state_growth)

    def _begin(self, index: int) -> None:
        limits = self._limits
        window = {"before": limits.before, "least": limits.least, "after": limits.after}
        self._losses[index] = OutlierSearch(ranges_below(limits.loss), **window)
        self._norms[index] = OutlierSearch(times_above(limits.norm), **window)

    def _advise(self, cause: str, place: str, found: Outlier, advice: str) -> None:
        suggestion = (
            f"the {place} of update {found.step} was {found.value:.4g}, and between {found.lowest:.4g} and "
            f"{found.highest:.4g} in the other updates near it. {advice}: it is finite, so nothing was changed."
        )
        self._say(cause, place, suggestion, value=found.value, lowest=found.lowest, highest=found.highest)

    def _say(self, cause: str, place: str, suggestion: str, **evidence: float) -> None:
        confidence = self._context.thresholds.diagnosis.confidence.suspicion
        self._loop.advise(Finding(cause, confidence, evidence, place, suggestion=suggestion))
