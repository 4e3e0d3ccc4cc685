"""Checks whether weights look untrained: with the bounds or the spread of a usual initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_nanguard.thresholds.mistakes import MistakeThresholds

_GAINS = (1.0, math.sqrt(2), 5 / 3)
_SPREADS = (0.01, 0.02, 1.0)


def looks_untrained(weight: Tensor, owner: nn.Module, thresholds: MistakeThresholds) -> bool | None:
    """Whether a parameter looks untrained; ``None`` if it has too few elements to decide.

    Several equal numbers, such as all zeros or all ones, look untrained. Other weights look untrained if they fill
    exactly the bounds of a uniform initialisation, or have the mean, spread and kurtosis of a normal one. A few updates
    change both.
    """
    values = weight.detach()
    if not values.is_floating_point() or values.layout != torch.strided or not values.numel():
        return None
    values = values.flatten()
    values = values[:: max(1, len(values) // thresholds.most_numbers)].double()
    first = float(values[0])
    if (first in (0.0, 1.0) or len(values) > 1) and bool((values == first).all()):
        return True
    if isinstance(owner, ParametrizationList) and weight.numel() == max(weight.shape):
        return None  # weight normalisation: the norms of the rows have no usual initialisation
    count, fans = len(values), _fans(weight, owner)
    if weight.dim() < 2 and fans is None and not isinstance(owner, nn.RNNBase):
        return False if len(values) > 1 else None  # weights of a normalisation start as zeros and ones
    largest, mean, spread = float(values.abs().max()), float(values.mean()), float(values.std(correction=0))
    few, bounds = count < thresholds.checked_numbers, list(_bounds(fans, owner))
    lowest = math.exp(-thresholds.bound_slack / count)
    if any(lowest * bound <= largest <= bound * (1 + 1e-6) for bound in bounds):
        return None if few else True
    if weight.dim() < 2:
        return False if bounds else None  # biases start as zeros or uniform
    if few:
        return None
    if abs(mean) > thresholds.deviation_slack * spread / math.sqrt(count):
        return False
    slack = thresholds.deviation_slack / math.sqrt(2 * count)
    if slack > thresholds.least_precision:
        return None
    if not any(abs(spread / one - 1) < slack for one in _spreads(fans)):
        return False
    kurtosis = float(((values - mean) / spread).pow(4).mean())
    return abs(kurtosis - 3) < thresholds.deviation_slack * math.sqrt(24 / count)


def _fans(weight: Tensor, owner: nn.Module) -> tuple[int, int] | None:
    matrix = weight if weight.dim() > 1 else getattr(owner, "weight", None)
    if not isinstance(matrix, Tensor) or matrix.dim() < 2:
        return None
    return matrix.numel() // matrix.shape[0], matrix.numel() // matrix.shape[1]


def _bounds(fans: tuple[int, int] | None, owner: nn.Module) -> Iterable[float]:
    if isinstance(owner, nn.RNNBase):
        yield 1 / math.sqrt(owner.hidden_size)
    if isinstance(owner, nn.Bilinear):
        yield 1 / math.sqrt(owner.in1_features)
    if fans is None:
        return
    into, out = fans
    yield 1 / math.sqrt(into)
    for gain in _GAINS:
        yield gain * math.sqrt(3 / into)
        yield gain * math.sqrt(6 / (into + out))


def _spreads(fans: tuple[int, int] | None) -> Iterable[float]:
    yield from _SPREADS
    if fans is None:
        return
    into, out = fans
    for gain in _GAINS:
        yield gain / math.sqrt(into)
        yield gain / math.sqrt(out)
        yield gain * math.sqrt(2 / (into + out))
