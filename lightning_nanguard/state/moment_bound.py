"""Finds first moments of Adam that no sequence of gradients can produce together with their second moments."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.device import Device, OutOfMemory
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.thresholds.fixed import ELEMENTS_AT_ONCE
from lightning_nanguard.thresholds.snapshots import MomentThresholds

_logger = logging.getLogger("lightning_nanguard")
# Other optimizers may keep something else under the same names.
_KNOWN = (Adam, AdamW, NAdam, RAdam)
_EXACT = (torch.float32, torch.float64)


def largest_ratio(beta1: float, beta2: float) -> float | None:
    """Bound of m² / v for the two moments m and v of one sequence of numbers; ``None`` if there is none.

    It follows from the inequality of Cauchy and Schwarz, with m = (1 − β₁) Σ β₁ⁱ gᵢ and v = (1 − β₂) Σ β₂ⁱ gᵢ². Moments
    within the bound stay within it.

    Example:
        >>> round(largest_ratio(0.9, 0.999) ** 0.5, 2)
        7.27
    """
    if not (0 <= beta1 < 1 and 0 < beta2 < 1 and beta1 * beta1 < beta2):
        return None
    return (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1 * beta1 / beta2))


@final
class MomentScreen:
    """Counts of elements of first moments that exceed their bound, on their way to the host.

    Args:
        counts: For each first moment the number of its elements that are out of bounds.
        device: Sends the counts.
    """

    def __init__(self, counts: Mapping[StateKey, Tensor], device: Device | None = None) -> None:
        device = Device() if device is None else device
        devices: dict[torch.device, dict[StateKey, Tensor]] = {}
        for key, value in counts.items():
            devices.setdefault(value.device, {})[key] = value
        self._sent = [(list(one), device.read_later(torch.stack(list(one.values())))) for one in devices.values()]

    def arrived(self) -> bool:
        """Whether reading the counts would not wait for a device."""
        return all(copy.arrived() for _, copy in self._sent)

    def beyond(self) -> dict[StateKey, int]:
        """State keys of the first moments that are out of bounds, each with the number of such elements."""
        counts = (pair for keys, copy in self._sent for pair in zip(keys, copy.read(), strict=True))
        return {key: int(count) for key, count in counts if count > 0}


@final
class MomentBound:
    """Checks the first moments of torch's Adam, AdamW, NAdam and RAdam.

    Moments that are out of bounds from the start, such as those of a checkpoint from a run with other betas, are
    exempt. So are all moments of an optimizer whose betas change, and moments that go out of bounds in many elements at
    once, because somebody has rewritten them.

    Args:
        learner: The learner of the run.
        thresholds: Numerical tolerance.
    """

    def __init__(self, learner: Learner, thresholds: MomentThresholds = MomentThresholds()) -> None:
        self._learner = learner
        self._limits = thresholds
        self._betas: dict[tuple[int, int], Any] = {}
        self._changed: set[int] = set()
        self._exempt: set[StateKey] = set()

    def screen(self, leaves: Mapping[StateKey, Any]) -> MomentScreen:
        """Measure a state of the learner without waiting for a device; measure nothing if the device has no room."""
        try:
            return MomentScreen(self._counts(leaves), self._learner.device)
        except OutOfMemory as error:
            _logger.debug("NaNGuard: the device has no room to look at first moments: %r", error)
            return MomentScreen({}, self._learner.device)

    def _counts(self, leaves: Mapping[StateKey, Any]) -> dict[StateKey, Tensor]:
        counts = {}
        for key, ratio, least in self._bounded():
            moments = [leaves.get((*key[:-1], name)) for name in ("exp_avg", "exp_avg_sq")]
            first, second = (local(one) if isinstance(one, Tensor) else None for one in moments)
            if key not in self._exempt and first is not None and second is not None and _are_exact(first, second):
                counts[key] = self._beyond(first, second, ratio, least)
        return counts

    def beyond(self, screen: MomentScreen) -> set[StateKey]:
        """State keys of the first moments that are out of bounds in a few elements, which no gradient can cause."""
        found = screen.beyond()
        if sum(found.values()) > self._limits.most_elements:
            self._exempt |= found.keys()
            return set()
        return set(found)

    def exempt(self, screen: MomentScreen) -> None:
        """Exempt the moments that are out of bounds from now on."""
        self._exempt |= screen.beyond().keys()

    def _bounded(self) -> Iterator[tuple[StateKey, float, float]]:
        names = self._learner.parameter_names()
        for index, optimizer in enumerate(self._learner.optimizers):
            if type(optimizer) not in _KNOWN or self._betas_change(index, optimizer):
                continue
            for group in optimizer.param_groups:
                beta1, beta2 = group["betas"]
                if isinstance(beta1, Tensor) or isinstance(beta2, Tensor) or 1 - beta2 < self._limits.least_decay:
                    continue
                ratio = largest_ratio(beta1, beta2)
                if ratio is None:
                    continue
                least = self._limits.underflows / (1 - beta2)
                for parameter in group["params"]:
                    yield ("optimizer", index, names.get(id(parameter), ""), "exp_avg"), ratio, least

    def _betas_change(self, index: int, optimizer: Optimizer) -> bool:
        for number, group in enumerate(optimizer.param_groups):
            cycles = "base_momentum" in group or "max_momentum" in group
            if cycles or self._betas.setdefault((index, number), group["betas"]) != group["betas"]:
                self._changed.add(index)
        return index in self._changed

    def _beyond(self, first: Tensor, second: Tensor, ratio: float, least: float) -> Tensor:
        limits = self._limits
        ratio *= limits.slack**2
        floor = least * torch.finfo(first.dtype).tiny
        pieces = zip(*(torch.split(one.reshape(-1), ELEMENTS_AT_ONCE) for one in (first, second)), strict=True)
        # A second moment of exactly 0 was reset or pruned. A flipped bit does not give 0.
        counts = [
            (one.square().sub_(other, alpha=ratio) > ratio * floor).logical_and_(other > 0).sum()
            for one, other in pieces
        ]
        return torch.stack(counts).sum()


def _are_exact(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.dtype in _EXACT and first.numel() > 0 and is_strided(first) and is_strided(second)
