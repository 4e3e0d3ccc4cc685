"""What a batch shows by itself: non-finite values, ranges and outliers. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_nanguard.diagnosis.case import BadField, Clues, Range
from lightning_nanguard.measure.finite import all_finite
from lightning_nanguard.thresholds.diagnosis import DataThresholds

_TARGETS = ("target", "targets", "label", "labels", "y")
_DATA = DataThresholds()


def batch_clues(batch: Any, module: nn.Module, thresholds: DataThresholds = _DATA) -> Clues:
    """What a batch shows by itself."""
    fields = dict(tensor_fields(batch))
    targets = target_fields(batch, fields)
    inputs = [
        _range(name, t, thresholds) for name, t in fields.items() if t.is_floating_point() and name not in targets
    ]
    known = [one for one in inputs if one is not None]
    target = next((found for name in targets if (found := _range(name, fields[name], thresholds)) is not None), None)
    return Clues(
        bad_fields=tuple(bad for name, t in fields.items() if (bad := _bad_field(name, t)) is not None),
        inputs=max(known, key=lambda one: max(abs(one.lowest), abs(one.highest)), default=None),
        target=target,
        normalises=_normalises(module),
    )


def tensor_fields(batch: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor in nested mappings and sequences, by its path."""
    if isinstance(batch, Tensor):
        if batch.layout == torch.strided:
            yield path or "0", batch
    elif isinstance(batch, (Mapping, list, tuple)):
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for name, item in items:
            yield from tensor_fields(item, f"{path}.{name}" if path else str(name))


def samples(batch: Any) -> int | None:
    """Samples in a batch; ``None`` where that cannot be told."""
    return next((len(tensor) for _, tensor in tensor_fields(batch) if tensor.dim()), None)


def target_fields(batch: Any, fields: Mapping[str, Tensor]) -> list[str]:
    """Paths of the target: the last of several items, or what a mapping calls so."""
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        last = str(len(batch) - 1)
        return [name for name in fields if name == last or name.startswith(f"{last}.")]
    return [name for name in fields if name.rsplit(".", 1)[-1].lower() in _TARGETS]


def _bad_field(name: str, tensor: Tensor) -> BadField | None:
    if not tensor.is_floating_point() or all_finite(tensor):
        return None
    if not tensor.dim():
        return BadField(name, ())
    bad = ~torch.isfinite(tensor)
    columns: tuple[int, ...] = ()
    if tensor.dim() > 1:
        hit = bad.transpose(0, 1).flatten(1).any(1)
        columns = () if bool(hit.all()) else true_indices(hit)
    return BadField(name, true_indices(bad.reshape(len(bad), -1).any(1)), columns)


def true_indices(mask: Tensor) -> tuple[int, ...]:
    """Where a mask of one dimension is set."""
    return tuple(mask.nonzero().flatten().tolist())


def _range(name: str, tensor: Tensor, thresholds: DataThresholds) -> Range | None:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return None
    values = tensor.detach().cpu().double()
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return None
    outliers: tuple[int, ...] = ()
    usual = 0.0
    if values.dim() and len(values) >= thresholds.outlier_min_samples:
        largest = values.abs().reshape(len(values), -1).nan_to_num(0.0, 0.0, 0.0).amax(1)
        usual = float(largest.median())
        outliers = true_indices(largest > thresholds.outlier_factor * usual) if usual > 0 else ()
    return Range(
        field=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        lowest=float(finite.min()),
        highest=float(finite.max()),
        mean=float(finite.mean()),
        std=float(finite.std(correction=0)),
        outliers=outliers,
        usual=usual,
    )


def _normalises(module: nn.Module) -> bool:
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    return isinstance(first, (_NormBase, nn.LayerNorm, nn.GroupNorm))
