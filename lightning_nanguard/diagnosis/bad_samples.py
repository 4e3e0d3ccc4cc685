"""Finds the bad samples of a batch by their values, or by running parts of the batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.batch import largest_by_sample, samples, tensor_fields, true_indices
from lightning_nanguard.measure.finite import non_finite_fields
from lightning_nanguard.thresholds.batches import HealthyBatchesThresholds
from lightning_nanguard.thresholds.samples import SamplesThresholds

NOT_FINITE, FAR = "not finite", "out of proportion"
"""Causes that a sample shows by itself."""

_EXTREME = HealthyBatchesThresholds().extreme_factor


@final
@dataclass(frozen=True, slots=True)
class SampleFault:
    """Why one sample of a batch is bad.

    Attributes:
        cause: Cause of the fault.
        columns: The bad columns of each field of the batch. An empty tuple means all columns.
    """

    cause: str
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Found = dict[int, SampleFault]
"""Faults of samples by their index in the batch."""


def non_finite_samples(
    batch: Any, thresholds: SamplesThresholds = SamplesThresholds(), usual: Container[str] = ()
) -> Found:
    """Find the samples that hold NaN or Inf, in inputs or in targets.

    Args:
        batch: The batch.
        thresholds: How many columns are named.
        usual: Fields in which NaN and Inf are usual.
    """
    columns: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in _by_sample(batch).items():
        if name in usual:
            continue
        bad = ~torch.isfinite(tensor)
        for index in true_indices(bad.reshape(len(bad), -1).any(1)):
            columns.setdefault(index, {})[name] = _columns(bad[index], thresholds)
    return {index: SampleFault(NOT_FINITE, columns[index]) for index in sorted(columns)}


def far_samples(
    batch: Any,
    healthy: Sequence[Any] = (),
    thresholds: SamplesThresholds = SamplesThresholds(),
    extreme: float = _EXTREME,
) -> Found:
    """Find samples that are far larger than healthy batches, or else than the other samples of the batch.

    Args:
        batch: The batch.
        healthy: Healthy batches.
        thresholds: The factor to the other samples.
        extreme: The factor to healthy batches. The guard uses the same factor for a whole batch.
    """
    others = [{name: largest_by_sample(one) for name, one in _by_sample(kept).items()} for kept in healthy]
    columns: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in _by_sample(batch).items():
        mine = largest_by_sample(tensor)
        before = [float(one[name].max()) for one in others if name in one and len(one[name])]
        if len(before) >= thresholds.least_compared and max(before) > 0:
            limit = extreme * max(before)
        elif len(mine) >= thresholds.least_compared:
            limit = thresholds.far_factor_in_batch * float(mine.median())
        else:
            continue
        for index in true_indices(mine > limit) if limit > 0 else ():
            columns.setdefault(index, {})[name] = _columns(tensor[index].abs().double() > limit, thresholds)
    return {index: SampleFault(FAR, columns[index]) for index in sorted(columns)}


def _by_sample(batch: Any) -> dict[str, Tensor]:
    count = samples(batch)
    return {
        name: tensor.detach()
        for name, tensor in tensor_fields(batch)
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dim() and len(tensor) == count
    }


def _columns(bad: Tensor, thresholds: SamplesThresholds) -> tuple[int, ...]:
    """Bad columns of one sample; empty if all columns are bad, or too many to name."""
    if not bad.dim():
        return ()
    hit = true_indices(bad.reshape(len(bad), -1).any(1))
    return () if len(hit) == len(bad) or len(hit) > thresholds.columns_named else hit


Bad = Callable[[Sequence[int]], bool | None]
"""Whether a part of the batch gives a loss or a gradient that is not finite; ``None`` if it cannot be run."""


def search(
    indices: Sequence[int], bad: Bad, share: float = 1.0, thresholds: SamplesThresholds = SamplesThresholds()
) -> tuple[int, ...] | None:
    """Find bad samples by halving the batch; ``None`` if no samples explain the fault.

    Every part of the batch that holds a bad sample is bad.

    Args:
        indices: Indices of the samples to search.
        bad: Runs a part of the batch.
        share: Largest share of the samples that may be bad.
        thresholds: How many parts may be run.
    """
    found: list[int] = []
    waiting, runs, any_good = [list(indices)], 0, False
    while waiting:
        part = waiting.pop()
        runs += 1
        verdict = bad(part)
        if verdict is None or runs > thresholds.most_runs:
            return None
        if not verdict:
            any_good = True
            continue
        if len(part) == 1:
            found += part
            if len(found) > share * len(indices) and len(indices) > 1:
                return None
            if share < 1.0 and not any_good and len(found) == thresholds.all_bad_after:
                return None
            continue
        # Take every other sample, so that the first single samples come from all over the batch.
        waiting += [part[1::2], part[::2]]
    rest = [index for index in indices if index not in set(found)]
    explained = not found or not rest or bad(rest) is False
    return tuple(sorted(found)) if explained else None


@final
class SampleSearch:
    """Finds the bad samples of batches. If running parts explains nothing several times, it runs parts less often.

    Args:
        thresholds: When a sample counts as bad, and how often to search.
        extreme: As in :func:`far_samples`.
    """

    def __init__(self, thresholds: SamplesThresholds = SamplesThresholds(), extreme: float = _EXTREME) -> None:
        self._limits = thresholds
        self._extreme = extreme
        # Batches in a row in which no samples were found to explain the fault.
        self._unexplained = 0

    def judged(self, batch: Any, healthy: Sequence[Any], bad: Bad | None, cause: str) -> Found:
        """The bad samples of a batch.

        Args:
            batch: The batch.
            healthy: Healthy batches.
            bad: Runs a part of the batch; ``None`` if none can be run.
            cause: The cause to give to samples whose values alone show no fault.
        """
        limits = self._limits
        usual = non_finite_fields(healthy)
        far, found = far_samples(batch, healthy, limits, self._extreme), non_finite_samples(batch, limits, usual)
        if bad is not None and found:
            # Some models leave single missing values out.
            spoiling = search(tuple(found), bad, thresholds=limits)
            found = found if spoiling is None else {index: found[index] for index in spoiling}
        found = {**far, **found}
        count = samples(batch) or 0
        rest = [index for index in range(count) if index not in found]
        if bad is not None and rest:
            found |= {index: SampleFault(cause) for index in self._search(rest, bad)}
        return dict(sorted(found.items()))

    def _search(self, rest: Sequence[int], bad: Bad) -> tuple[int, ...]:
        limits, time = self._limits, self._unexplained + 1
        if time > limits.searches_in_vain and time & (time - 1):
            self._unexplained = time
            return ()
        spoiling = search(rest, bad, limits.largest_share, limits)
        if spoiling is None:
            self._unexplained = time
        elif spoiling:
            self._unexplained = 0
        return spoiling or ()
