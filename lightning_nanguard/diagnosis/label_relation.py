"""Checks whether labels are related to their inputs: whether neighbours share a label more often than by chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.batch import target_fields, tensor_fields
from lightning_nanguard.diagnosis.case import LabelRelation
from lightning_nanguard.thresholds.mistakes import LabelThresholds


def label_relation(batches: Sequence[Any], thresholds: LabelThresholds) -> LabelRelation | None:
    """How often neighbours in the inputs share a label, and how often they do by chance.

    It is ``None`` without class labels and real-valued inputs, or with too few rows. It is also ``None`` if inputs take
    only two values, as in a parity task, whose neighbours have different labels.

    Args:
        batches: Rows of the data set, in batches of one structure.
        thresholds: How many rows are compared, and with how many permutations of the labels.
    """
    fields = _joined(batches)
    found = _inputs_and_labels(batches[-1], fields, thresholds) if fields else None
    if found is None:
        return None
    inputs, labels = found
    own = torch.Generator().manual_seed(0)  # leaves the random stream of the run unchanged
    orders = [torch.randperm(len(labels), generator=own, device=own.device) for _ in range(thresholds.orders)]
    best, exceeds = 0.0, False
    chance = 0.0
    for view in _views(inputs):
        nearest = torch.cdist(view, view).fill_diagonal_(torch.inf).argmin(1)
        shared = float((labels[nearest] == labels).float().mean())
        others = [float((labels[order][nearest] == labels[order]).float().mean()) for order in orders]
        best, chance = max(best, shared), mean(others)
        exceeds |= shared > chance + thresholds.deviations * stdev(others)
    return LabelRelation(len(labels), best, chance, exceeds)


def _joined(batches: Sequence[Any]) -> dict[str, Tensor]:
    """The fields of all batches, concatenated; empty if their shapes do not match."""
    each = [dict(tensor_fields(batch)) for batch in batches]
    if not each or any(one.keys() != each[0].keys() for one in each):
        return {}
    joined = {}
    for name, first in each[0].items():
        parts = [one[name] for one in each]
        if any(part.shape[1:] != first.shape[1:] or not part.dim() for part in parts):
            return {}
        joined[name] = torch.cat(parts) if len(parts) > 1 else first
    return joined


def _inputs_and_labels(
    batch: Any, fields: Mapping[str, Tensor], thresholds: LabelThresholds
) -> tuple[Tensor, Tensor] | None:
    targets = target_fields(batch, fields)
    labels = next((fields[name] for name in targets), None)
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        return None
    others = [one for name, one in fields.items() if name not in targets]
    inputs = next((one for one in others if one.is_floating_point() and one.dim() > 1), None)
    if inputs is None or len(inputs) != len(labels) or len(labels) < thresholds.least_rows:
        return None
    step = max(1, len(labels) // thresholds.most_rows)
    chosen = labels[::step].detach().cpu()
    rows = inputs[::step].detach().flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // thresholds.most_columns)].cpu().float()
    counts = torch.bincount(chosen - chosen.min()) if int(chosen.max() - chosen.min()) < len(chosen) else None
    if counts is None or int((counts >= thresholds.rows_per_class).sum()) < 2 or not bool(torch.isfinite(rows).all()):
        return None
    return None if len(torch.unique(rows[:64])) <= 2 else (rows, chosen)


def _views(rows: Tensor) -> Iterator[Tensor]:
    """Several representations of the rows in which neighbours may be similar."""
    spread = rows.std(0)
    standard = (rows - rows.mean(0)) / torch.where(spread > 0, spread, 1.0)
    yield standard
    yield torch.nn.functional.normalize(standard, dim=1)
    if rows.shape[1] >= 8:
        yield torch.fft.rfft(rows).abs()  # similar waves, whatever their phase
