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
from lightning_nanguard.thresholds.snapshots import MomentThresholds

_DEFAULTS = MomentThresholds()
_logger = logging.getLogger("lightning_nanguard")
# Others may keep something else under the same names.
_KNOWN = (Adam, AdamW, NAdam, RAdam)
_EXACT = (torch.float32, torch.float64)


def largest_ratio(beta1: float, beta2: float) -> float | None:
    """Bound of m² / v for the moments m and v of one sequence of numbers; ``None`` if there is none.

    It is that of Cauchy and Schwarz: m = (1 − β₁) Σ β₁ⁱ gᵢ and v = (1 − β₂) Σ β₂ⁱ gᵢ². Moments within it stay so.

    Example:
        >>> round(largest_ratio(0.9, 0.999) ** 0.5, 2)
        7.27
    """
    if not (0 <= beta1 < 1 and 0 < beta2 < 1 and beta1 * beta1 < beta2):
        return None
    return (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1 * beta1 / beta2))


@final
class MomentScreen:
    """How many elements of first moments exceed their bound, on the way to the host.

    Args:
        counts: For each first moment the number of its elements that are out of bounds.
        device: Sends them.
    """

    def __init__(self, counts: Mapping[StateKey, Tensor], device: Device | None = None) -> None:
        device = Device() if device is None else device
        devices: dict[torch.device, dict[StateKey, Tensor]] = {}
        for key, value in counts.items():
            devices.setdefault(value.device, {})[key] = value
        self._sent = [(list(one), device.read_later(torch.stack(list(one.values())))) for one in devices.values()]

    def arrived(self) -> bool:
        """Whether reading it would not wait for a device."""
        return all(copy.arrived() for _, copy in self._sent)

    def beyond(self) -> dict[StateKey, int]:
        """State keys of the first moments that are out of bounds, with how many of their elements are."""
        counts = (pair for keys, copy in self._sent for pair in zip(keys, copy.read(), strict=True))
        return {key: int(count) for key, count in counts if count > 0}


@final
class MomentBound:
    """Checks the first moments of torch's Adam, AdamW, NAdam and RAdam.

    Moments that begin out of bounds, such as those of a checkpoint that was trained with other betas, are left alone.
    So are all of an optimizer whose betas change, and those that go out of bounds in many elements at once: somebody
    has rewritten moments.

    Args:
        learner: What is trained.
        thresholds: Numerical slack.
    """

    def __init__(self, learner: Learner, thresholds: MomentThresholds = _DEFAULTS) -> None:
        self._learner = learner
        self._limits = thresholds
        self._betas: dict[tuple[int, int], Any] = {}
        self._changed: set[int] = set()
        self._exempt: set[StateKey] = set()

    def screen(self, leaves: Mapping[StateKey, Any]) -> MomentScreen:
        """Measure a state of the learner, without waiting for a device; nothing where the device has no room for it."""
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
        """State keys of the first moments that something other than a gradient has changed in a few elements."""
        found = screen.beyond()
        if sum(found.values()) > self._limits.most_elements:
            self._exempt |= found.keys()
            return set()
        return set(found)

    def exempt(self, screen: MomentScreen) -> None:
        """Leave those alone from now on that are out of bounds."""
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
        pieces = zip(*(torch.split(one.reshape(-1), limits.piece) for one in (first, second)), strict=True)
        # A second moment of exactly 0 was reset or pruned, which no flipped bit does.
        counts = [
            (one.square().sub_(other, alpha=ratio) > ratio * floor).logical_and_(other > 0).sum()
            for one, other in pieces
        ]
        return torch.stack(counts).sum()


def _are_exact(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.dtype in _EXACT and first.numel() > 0 and is_strided(first) and is_strided(second)
