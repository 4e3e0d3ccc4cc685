"""Finds tensors of a learner that are finite and far out of range."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.finite import has_nan
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.finite import SECOND_MOMENTS
from lightning_nanguard.state.learner import Learner, StateKey, describe
from lightning_nanguard.state.moment_bound import MomentBound
from lightning_nanguard.state.norm_screen import NormScreen
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Share, Snapshot
from lightning_nanguard.thresholds.snapshots import PlausibilityThresholds
from lightning_nanguard.types import Fault

_MOMENTS = SECOND_MOMENTS | {"exp_avg", "momentum_buffer"}


def first_jump(
    now: Mapping[StateKey, Any],
    then: Mapping[StateKey, Any],
    keys: Collection[StateKey],
    factor: float,
    least: float,
    most: Mapping[StateKey, float] | None = None,
) -> str | None:
    """Name of the first tensor among ``keys`` whose largest element has grown more than ``factor`` times.

    Args:
        now: The present tensors.
        then: The earlier tensors.
        keys: The tensors to compare.
        factor: Growth that is too much.
        least: Magnitude from which growth is counted.
        most: Largest magnitude of moments that were 0 or are new. Moments without an entry do not count, because their
            first values depend on the unit of the loss.
    """
    most = {} if most is None else most
    pairs = [(key, now[key], then.get(key)) for key in now if key in keys and (key in then or key in most)]
    pairs = [(key, one, other) for key, one, other in pairs if _comparable(one, one if other is None else other)]
    if not pairs:
        return None
    largest = norms([one for _, one, _ in pairs], math.inf)
    was = norms([one.new_zeros(()) if other is None else other for _, one, other in pairs], math.inf)
    far = (
        key
        for (key, _, _), one, other in zip(pairs, largest, was, strict=True)
        if other == other  # a tensor that was NaN before cannot be compared
        and not one <= (factor * max(other, least) if other > 0 or key[0] != "optimizer" else most.get(key, math.inf))
    )
    found = next(far, None)
    return None if found is None else describe(found)


def _bounded(snapshot: Snapshot) -> Mapping[StateKey, Any]:
    """The tensors of a snapshot. A tensor that ranks share is replaced by one of the same shape, filled with its norm.

    No element is larger than the norm. The elements themselves are not here, because each rank stores a part.
    """
    return {
        key: torch.tensor(snapshot.typical.get(key, math.nan) * math.sqrt(leaf.shape.numel())).expand(leaf.shape)
        if isinstance(leaf, Share)
        else leaf
        for key, leaf in snapshot.leaves.items()
    }


def _comparable(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.is_floating_point() and 0 < one.numel() == other.numel()


@final
class PlausibilityCheck:
    """Finds weights, statistics and moments that are finite, but have grown more than training can explain.

    Normalising layers hide such tensors from the loss. They are compared with the newest certified snapshot. If the run
    has since continued from a state that was trained beside it, they are compared with that state.

    Args:
        learner: The learner of the run.
        ring: Stores the snapshots.
        is_worse: Says whether the loss of the newest batches is clearly higher under one state than under another;
            ``False`` if that is not known.
        thresholds: What is too much.
        certain_only: Whether only extreme growth counts, and no batch is run.
        largest_norm: Gives the largest gradient norm of an optimizer so far; ``None`` if it is not known.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        is_worse: Callable[[Snapshot, Snapshot], bool],
        thresholds: PlausibilityThresholds = PlausibilityThresholds(),
        *,
        certain_only: bool = False,
        largest_norm: Callable[[int], float | None] = lambda index: None,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._is_worse = is_worse
        self._limits = limits = thresholds
        self._weight_growth = limits.certain_weight_growth if certain_only else limits.weight_growth
        self._state_growth = limits.early_growth if certain_only else limits.state_growth
        self._largest_norm = largest_norm
        self._first_jump = partial(first_jump, least=limits.least_magnitude)
        self._jumps: Counter[str] = Counter()
        self.watches_statistics = False
        """Whether a batch may have made running statistics bad, so that they are checked for each batch."""
        self._watched: set[str] = set()
        self.moments = MomentBound(learner, limits.moments)
        """Finds first moments that are out of bounds."""

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {
            "jumps": dict(self._jumps),
            "watches_statistics": self.watches_statistics,
            "watched_buffers": sorted(self._watched),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The state may be empty."""
        self._jumps = Counter(state.get("jumps", {}))
        self.watches_statistics = bool(state.get("watches_statistics", False))
        self._watched = set(state.get("watched_buffers", ()))

    @property
    def watches(self) -> bool:
        """Whether a batch may have made running statistics or another buffer bad, so that each batch is checked."""
        return self.watches_statistics or bool(self._watched)

    def screen(self, screen: NormScreen, before: Mapping[StateKey, float], healthy_steps: int) -> set[StateKey]:
        """State keys of tensors that may be out of range by their norms, so that :meth:`implausible` must check them.

        Args:
            screen: The norms.
            before: Typical size of each tensor in the newest certified snapshot.
            healthy_steps: Updates accepted so far.
        """
        limits, before = self._limits, {**self._of_gradients(screen.typical.keys() - before.keys()), **before}
        beyond = screen.beyond(before, self._weight_growth, limits.least_magnitude)
        if healthy_steps <= limits.settled_after:
            # Statistics and moments are still close to their initial values then.
            parameters = {key for key in beyond if key[0] == "parameter"}
            return parameters | screen.beyond(before, limits.early_growth, limits.least_magnitude)
        return beyond

    def implausible(
        self, leaves: Mapping[StateKey, Any], healthy_steps: int, state: Snapshot | None = None
    ) -> Fault | None:
        """The fault of a tensor that is far out of range; ``None`` if there is none, or nothing is certified yet.

        Args:
            leaves: A state of the learner.
            healthy_steps: Updates accepted so far.
            state: The same state as a snapshot, if there is one. In a doubtful case it is tried on the newest batches.
        """
        newest = self._ring.origin()
        if newest is None:
            return None
        beyond = self.moments.beyond(self.moments.screen(leaves))
        if beyond:
            first = describe(next(key for key in leaves if key in beyond))
            message = f"{first} is larger than its second moment allows, whatever the gradients were"
            return Fault("implausible_state", "state", first, None, message, conclusive=True)
        then, untrained = _bounded(newest), self._learner.untrained().keys()
        weights = {key for key in leaves if key[0] == "parameter"} - untrained
        statistics = set(self._learner.statistics(leaves))
        others = {*statistics, *(key for key in leaves if key[0] == "optimizer")}
        sure = self._growth(healthy_steps, self._weight_growth)
        # Before the first update, statistics and moments have initial values, which say nothing about later ones.
        usual = self._growth(healthy_steps if newest.step > 0 else 0, self._state_growth)
        for keys, factor in ((weights, self._weight_growth), (untrained, self._weight_growth), (others, usual)):
            most = {key: self._limits.early_growth * size for key, size in self._of_gradients(keys).items()}
            far = self._first_jump(leaves, then, keys, factor, most=most)
            if far is not None and keys is others:
                rest = others - self._in_proportion(leaves, others)
                far = self._first_jump(leaves, then, rest, factor, most=most)
            if far is None:
                continue
            # A tensor that is out of range again after a restore may belong there. Some weights grow far at first, if
            # data are not scaled. The loss then decides, but it says something about weights only.
            doubtful = far in self._jumps or (
                factor < sure and self._first_jump(leaves, then, keys, sure, most=most) is None
            )
            if doubtful and not (keys is weights and self._is_ruin(far, state, newest)):
                continue
            self._jumps[far] += 1
            # If a batch caused it, the next such batch can be skipped.
            buffers = {key for key in statistics if key[0] == "buffer"}
            self.watches_statistics |= self._first_jump(leaves, then, buffers, usual) is not None
            message = f"{far} is over {factor:g} times as large as before"
            if keys is untrained:  # no update changes it, so no rate is the cause
                return Fault("implausible_state", "state", far, None, message, conclusive=True)
            # A trial on the newest batches gives finite evidence. So the branch that is given up is compared later.
            return Fault("implausible_state", "state", far, None, message, certain=not doubtful, rate_may_cause=True)
        return None

    def watch(self, place: str) -> None:
        """Check from now on what each batch does to running statistics or to another buffer, if ``place`` is one.

        Args:
            place: The tensor that was bad, as :func:`~lightning_nanguard.state.learner.describe` names it.
        """
        weights = dict(self._learner.weights())
        statistics = set(self._learner.statistics(weights))
        self.watches_statistics |= any(place.endswith(describe(key)) for key in statistics)
        buffers = {key for key in weights if key[0] == "buffer"}
        self._watched.update(key[1] for key in buffers - statistics if describe(key) == place)

    def is_far(self, place: str) -> bool:
        """Whether a tensor is far out of range now. This stores nothing.

        Args:
            place: The tensor, as :func:`~lightning_nanguard.state.learner.describe` names it.
        """
        now = dict(self._learner.leaves())
        keys = [key for key in now if describe(key) == place]
        origin = self._ring.origin()
        if not keys or origin is None:
            return False
        return self._first_jump(now, _bounded(origin), keys, self._limits.weight_growth) is not None

    def strange_buffers(self, before: Mapping[str, Tensor], healthy_steps: int) -> Fault | None:
        """The fault of the present batch if it made a buffer that is checked bad; else ``None``.

        Running statistics are bad if they are far too large, and other buffers if they hold NaN and held none.

        Args:
            before: Buffers as they were before the batch, by name.
            healthy_steps: Updates accepted so far.
        """
        then = {("buffer", name): tensor for name, tensor in before.items()}
        now = dict(self._learner.weights())
        watched = [key for key in then if key[1] in self._watched and key in now]
        spoilt = next((key for key in watched if has_nan(now[key]) and not has_nan(then[key])), None)
        if spoilt is not None:
            message = f"the forward pass of this batch made {describe(spoilt)} NaN"
            return Fault("non_finite_statistics", "batch", describe(spoilt), None, message, conclusive=True)
        return self._strange_statistics(now, then, healthy_steps) if self.watches_statistics else None

    def _strange_statistics(
        self, now: Mapping[StateKey, Any], then: Mapping[StateKey, Any], healthy_steps: int
    ) -> Fault | None:
        usual = self._state_growth
        far = self._first_jump(now, then, self._learner.statistics(now), self._growth(healthy_steps, usual))
        if far is None:
            return None
        message = f"this batch made {far} over {usual:g} times as large"
        return Fault("implausible_statistics", "batch", far, None, message)

    def _in_proportion(self, leaves: Mapping[StateKey, Any], keys: Collection[StateKey]) -> set[StateKey]:
        """Moments whose size fits the newest gradients. They may be large because the unit of the loss has changed."""
        if self._learner.scaler is not None:
            return set()  # the gradients may be multiplied by the loss scale
        indices = range(len(self._learner.optimizers))
        gradients = {("optimizer", i, name): one for i in indices for name, one in self._learner.named_gradients(i)}
        found = [(key, leaves[key], gradients[key[:3]]) for key in keys if key[:3] in gradients]
        found = [(key, moment, gradient) for key, moment, gradient in found if _comparable(moment, gradient)]
        moments = norms([moment for _, moment, _ in found], math.inf)
        sizes = norms([gradient for _, _, gradient in found], math.inf)
        return {
            key
            for (key, _, _), moment, size in zip(found, moments, sizes, strict=True)
            if moment <= self._limits.times_gradient * size ** (2 if key[3] in SECOND_MOMENTS else 1)
        }

    def _of_gradients(self, keys: Collection[StateKey]) -> dict[StateKey, float]:
        """About the largest size that past gradients can give each moment of torch's optimizers among ``keys``."""
        moments = [key for key in keys if key[0] == "optimizer" and key[-1] in _MOMENTS]
        sizes: dict[int, float] = {}
        for index in {key[1] for key in moments}:
            norm = self._largest_norm(index)
            if norm is not None and type(self._learner.optimizers[index]).__module__.startswith("torch.optim."):
                sizes[index] = max(norm, norm * norm, self._limits.least_magnitude)
        return {key: sizes[key[1]] for key in moments if key[1] in sizes}

    def _growth(self, healthy_steps: int, usual: float) -> float:
        return usual if healthy_steps > self._limits.settled_after else self._limits.early_growth

    def _is_ruin(self, far: str, state: Snapshot | None, newest: Snapshot) -> bool:
        return state is not None and self._jumps[far] < self._limits.trials and self._is_worse(state, newest)
