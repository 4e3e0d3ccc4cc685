"""Checks the samples of a data set one by one, and reports those that are unlike the others."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor
from torch.utils.data import default_collate

from lightning_nanguard.diagnosis.bad_samples import non_finite_samples
from lightning_nanguard.diagnosis.batch import largest_by_sample
from lightning_nanguard.measure.batches import named_tensors
from lightning_nanguard.measure.sample_parts import hash_of
from lightning_nanguard.record.bad_samples import BadSample
from lightning_nanguard.thresholds.samples import SamplesThresholds

Shapes = tuple[tuple[str, str], ...]
"""Each field of a sample with its shape and dtype in words."""


@final
@dataclass(frozen=True, slots=True)
class Unreadable:
    """Takes the place of a sample that raised an exception when it was read.

    Attributes:
        error: The exception in words.
    """

    error: str


@final
@dataclass(frozen=True, slots=True)
class Collated:
    """A sample that is already a batch of one.

    Attributes:
        batch: The batch.
    """

    batch: Any


@final
class DataCheck:
    """Takes samples, and reports at the end which are not finite, out of range, or of another shape or dtype.

    It keeps a few numbers of each sample.

    Args:
        factor: A sample is out of range if it is this many times as large as the usual largest number of the field.
            ``None`` for the default.
        thresholds: Which values are usual.

    Example:
        >>> import torch
        >>> check = DataCheck()
        >>> for row in range(10):
        ...     check.see(BadSample("", row), torch.tensor([1.0, float("nan") if row == 3 else 2.0]))
        >>> [(one.row, one.cause) for one in check.found()]
        [(3, 'not finite')]
    """

    def __init__(self, factor: float | None = None, thresholds: SamplesThresholds = SamplesThresholds()) -> None:
        self._factor = thresholds.checked_factor if factor is None else factor
        self._limits = thresholds
        self._bad: list[BadSample] = []
        self._places: list[BadSample] = []
        self._shapes: list[int] = []
        self._known: dict[Shapes, int] = {}
        # Largest number of each field in each sample; NaN if the sample lacks the field.
        self._largest: dict[str, array[float]] = {}
        self.count = 0

    def see(self, place: BadSample, sample: Any) -> None:
        """Take one sample.

        Args:
            place: Its row, or its batch and index.
            sample: The sample as the data set returned it.
        """
        self.count += 1
        if isinstance(sample, Unreadable):
            self._bad.append(replace(place, cause=f"cannot be read: {sample.error}"))
            return
        batch = _batch_of_one(sample)
        fields = {name: tensor for name, tensor in named_tensors(batch) if tensor.dim()}
        not_finite = non_finite_samples(batch, self._limits).get(0)
        if not_finite is not None:
            named = replace(place, cause=not_finite.cause, columns=not_finite.columns)
            self._bad.append(replace(named, hash=hash_of(batch, 0)) if place.row is None else named)
        shapes = tuple((name, _shape(tensor)) for name, tensor in fields.items())
        self._shapes.append(self._known.setdefault(shapes, len(self._known)))
        self._places.append(place)
        for name, tensor in fields.items():
            kept = self._largest.setdefault(name, array("d"))
            kept.extend([float("nan")] * (len(self._places) - 1 - len(kept)))
            kept.append(float(largest_by_sample(tensor[:1])[0]) if tensor.is_floating_point() else 0.0)

    def found(self) -> list[BadSample]:
        """The samples that are unlike the others, by cause, in the order in which they were seen."""
        return [*self._bad, *self._other_shapes(), *self._out_of_range()]

    def shapes_vary(self) -> bool:
        """Whether samples have so many shapes that none is the usual one."""
        return bool(self._shapes) and self._usual_shapes() is None

    def _usual_shapes(self) -> int | None:
        ((usual, count),) = Counter(self._shapes).most_common(1)
        return usual if count >= self._limits.usual_share * len(self._shapes) else None

    def _other_shapes(self) -> list[BadSample]:
        usual = self._usual_shapes() if self._shapes else None
        if usual is None:
            return []
        shapes = list(self._known)
        return [
            replace(place, cause=_difference(dict(shapes[known]), dict(shapes[usual])))
            for place, known in zip(self._places, self._shapes, strict=True)
            if known != usual
        ]

    def _out_of_range(self) -> list[BadSample]:
        found = []
        for name, numbers in self._largest.items():
            known = sorted(number for number in numbers if number == number)
            usual = known[len(known) // 2]
            if usual <= 0 or len(known) < self._limits.least_compared:
                continue
            found += [
                replace(
                    self._places[index],
                    cause=f"reaches {number:.4g} in magnitude where half of the samples stay within {usual:.4g}",
                    columns={name: ()},
                )
                for index, number in enumerate(numbers)
                if number > self._factor * usual
            ]
        return found


def _batch_of_one(sample: Any) -> Any:
    if isinstance(sample, Collated):
        return sample.batch
    try:
        return default_collate([sample])
    except (TypeError, RuntimeError, ValueError):  # the user's collate function may return anything
        return {name: tensor[None] for name, tensor in named_tensors(sample)}


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape[1:])} {str(tensor.dtype).removeprefix('torch.')}"


def _difference(mine: Mapping[str, str], usual: Mapping[str, str]) -> str:
    lacking = [f"field {name} is missing" for name in usual if name not in mine]
    more = [f"field {name} is new" for name in mine if name not in usual]
    other = [
        f"field {name} is {mine[name]}, usually {usual[name]}"
        for name in mine
        if name in usual and mine[name] != usual[name]
    ]
    return "; ".join([*other, *lacking, *more])
