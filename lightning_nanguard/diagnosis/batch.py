"""Measures the values of a batch: non-finite values, ranges and outliers. The model is not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_nanguard.diagnosis.case import BadField, Clues, Range
from lightning_nanguard.measure.batches import largest_magnitudes, mapped, named_tensors
from lightning_nanguard.measure.finite import all_finite
from lightning_nanguard.measure.tensors import dense_values, is_plain, local
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DataThresholds

_TARGETS = ("target", "targets", "label", "labels", "y")


def batch_clues(
    batch: Any, module: nn.Module, thresholds: DataThresholds = DEFAULT.data, *, count: int | None = None
) -> Clues:
    """Measure the values of a batch, without running the model.

    Args:
        batch: The batch.
        module: The module trained.
        thresholds: When a number is an outlier.
        count: Number of its samples; ``None`` if it is not known. Then the first axis of each tensor counts them.
    """
    fields = dict(named_tensors(mapped(batch, _padded, PackedSequence)))
    targets = target_fields(batch, fields)
    inputs = [
        _range(name, t, thresholds) for name, t in fields.items() if t.is_floating_point() and name not in targets
    ]
    known = [one for one in inputs if one is not None]
    target = next((found for name in targets if (found := _range(name, fields[name], thresholds)) is not None), None)
    return Clues(
        bad_fields=tuple(bad for name, t in fields.items() if (bad := _bad_field(name, t, fields, count)) is not None),
        inputs=max(known, key=attrgetter("largest"), default=None),
        target=target,
        normalises=_normalises(module),
    )


def compared(clues: Sequence[Clues], healthy: Sequence[Any]) -> list[Clues]:
    """Add to the ranges of some batches how large the same fields were in the healthy batches before."""
    known = [dict(named_tensors(batch)) for batch in healthy]

    @cache
    def before(field: str) -> float:
        fields = [one[field] for one in known if field in one]
        return max((size for tensor in fields for size in largest_magnitudes(tensor)), default=0.0)

    def with_before(found: Range | None) -> Range | None:
        return None if found is None else replace(found, before=before(found.field))

    return [replace(one, inputs=with_before(one.inputs), target=with_before(one.target)) for one in clues]


def tensor_fields(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor in a batch, with its path."""
    return ((name, tensor) for name, tensor in named_tensors(batch) if is_plain(tensor))


def _padded(packed: PackedSequence) -> Tensor:
    # A packed sequence mixes the rows of all samples, ordered by time.
    return pad_packed_sequence(packed, batch_first=True)[0]


def samples(batch: Any) -> int | None:
    """Number of samples in a batch; ``None`` if it is not known."""
    return next((len(tensor) for _, tensor in tensor_fields(batch) if tensor.dim()), None)


def target_fields(batch: Any, fields: Mapping[str, Tensor]) -> list[str]:
    """Paths of the target: fields with such a name, or the last of several items without names."""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields") and len(batch) > 1:
        last = str(len(batch) - 1)
        return [name for name in fields if name == last or name.startswith(f"{last}.")]
    return [name for name in fields if name.rsplit(".", 1)[-1].lower() in _TARGETS]


def _bad_field(name: str, tensor: Tensor, fields: Mapping[str, Tensor], count: int | None) -> BadField | None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or all_finite(tensor):
        return None
    values = local(tensor).detach()
    if count is None or not is_plain(values):
        return BadField(name, *_bad_places(values))
    sample, has_rows = _place_among(name, fields, count), values.shape[:1] == (count,)
    if sample is not None:
        return BadField(name, () if has_rows else (sample,))  # three images of three channels are ambiguous
    if has_rows:
        return BadField(name, *_bad_places(values))
    owners = _sample_of_each_row(fields, values.shape[:1], count)
    if owners is not None:
        rows, columns = _bad_places(values)
        return BadField(name, tuple(sorted(set(owners[list(rows)].tolist()))), columns)
    if values.shape[1:2] == (count,):  # time is the first axis
        return BadField(name, *_bad_places(values.transpose(0, 1)))
    return BadField(name, ())


def _sample_of_each_row(fields: Mapping[str, Tensor], rows: Sequence[int], count: int) -> Tensor | None:
    """The sample of each row, if a field holds the samples in ascending order, as ``batch`` of torch_geometric does."""
    for tensor in fields.values():
        if is_plain(tensor) and tensor.dtype == torch.long and list(tensor.shape) == list(rows) and len(tensor):
            ascending = bool((tensor[1:] >= tensor[:-1]).all())
            if ascending and (int(tensor[0]), int(tensor[-1])) == (0, count - 1):
                return tensor
    return None


def _place_among(name: str, fields: Iterable[str], count: int) -> int | None:
    """The place of a field in a list with one part for each sample, all of one structure, such as a list of images.

    The parts of the batch itself may be its fields, so a tensor among these has no such place.
    """
    parts = name.split(".")
    others = [other.split(".") for other in fields]
    for depth in range(len(parts) if len(parts) > 1 else 0):
        inside: dict[str, set[tuple[str, ...]]] = {}
        for other in others:
            if other[:depth] == parts[:depth] and len(other) > depth:
                inside.setdefault(other[depth], set()).add(tuple(other[depth + 1 :]))
        alike = all(one == inside[parts[depth]] for one in inside.values())
        if len(inside) == count and alike and all(place.isdecimal() for place in inside):
            return int(parts[depth])
    return None


def _bad_places(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns that hold NaN or Inf. Columns are empty if all hold some; both are empty if not known."""
    if tensor.is_nested:
        return tuple(row for row, part in enumerate(tensor.unbind()) if not all_finite(part)), ()
    if tensor.layout != torch.strided:
        entries = tensor.to_sparse().coalesce()
        bad = ~torch.isfinite(entries.values().reshape(entries._nnz(), -1)).all(1)
        rows, *others = (tuple(axis[bad].unique().tolist()) for axis in entries.indices())
        return rows, others[0] if others else ()
    values = tensor if is_plain(tensor) else dense_values(tensor)
    if not values.dim() or values.shape != tensor.shape:
        return (), ()
    bad = ~torch.isfinite(values)
    columns: tuple[int, ...] = ()
    if values.dim() > 1:
        hit = bad.transpose(0, 1).flatten(1).any(1)
        columns = () if bool(hit.all()) else true_indices(hit)
    return true_indices(bad.reshape(len(bad), -1).any(1)), columns


def true_indices(mask: Tensor) -> tuple[int, ...]:
    """Indices at which a mask of one dimension is true."""
    return tuple(mask.nonzero().flatten().tolist())


def largest_by_sample(tensor: Tensor) -> Tensor:
    """Largest magnitude of each sample, on the CPU. Numbers that are not finite count as 0."""
    if not tensor.numel():
        return torch.zeros(len(tensor), dtype=torch.float64)
    return tensor.abs().reshape(len(tensor), -1).double().nan_to_num(0.0, 0.0, 0.0).amax(1).cpu()


def _range(name: str, tensor: Tensor, thresholds: DataThresholds) -> Range | None:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return None
    plain = is_plain(tensor)
    values = (tensor.detach() if plain else dense_values(tensor)).cpu().double()
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return None
    outliers: tuple[int, ...] = ()
    usual = 0.0
    if plain and values.dim() and len(values) >= thresholds.outlier_min_samples:
        largest = largest_by_sample(values)
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
