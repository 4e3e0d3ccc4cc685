"""Compares the first batches of an epoch with each other."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, final

from torch import Tensor

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.measure.checksum import checksums
from lightning_nanguard.measure.tensors import is_plain
from lightning_nanguard.thresholds.mistakes import MistakeThresholds


@final
class FirstBatches:
    """Counts how many of the first batches of an epoch differ. It holds a few numbers of each.

    It first reads a few numbers of one field of each batch. If these repeat, or cannot be read without waiting for a
    device, it compares batches by checksums of all numbers, because most numbers of a batch may be zero.

    Example:
        >>> batches = FirstBatches(MistakeThresholds())
        >>> [batches.see(Tensor([1.0, 2.0]), first=index == 0) for index in range(4)]
        [True, True, True, True]
        >>> batches.count()
        (2, 1)
    """

    def __init__(self, thresholds: MistakeThresholds) -> None:
        self._limits = thresholds
        # The numbers of the first field of each batch, as long as all of them differ.
        self._different: set[Hashable] | None = set()
        # Checksums and some numbers of each batch; they are read at the end.
        self._kept: list[list[Tensor]] = []
        # Of each tensor of the newest batch, whether all of its elements are equal.
        self._constant: list[Tensor] = []

    def see(self, batch: Any, *, first: bool) -> bool:
        """Look at a batch.

        Args:
            batch: The batch.
            first: Whether it is the first one of an epoch. Those of the epoch before are then forgotten.

        Returns:
            Whether further batches are needed.
        """
        limits, different = self._limits, self._different
        if first:
            self._kept.clear()
            if different is not None:
                different.clear()
        if different is not None:
            numbers = _first_numbers(batch, limits)
            if numbers is not None and numbers not in different:
                different.add(numbers)
                return len(different) <= (1 - limits.repeated) * limits.batches
            self._different = None
            if numbers is not None:
                # If batches come in pairs, eight that begin with the second of a pair hold one repetition less.
                return True
        tensors = [one for one in nested_tensors(batch) if is_plain(one) and one.numel()]
        # Checksums of tensors that are filled with one number may be equal.
        kept = [*checksums(tensors), *(_some_numbers(one, limits) for one in tensors)]
        if kept:
            self._kept.append(kept)
            self._constant = [(one == one[(0,) * one.dim()]).all() for one in tensors]
        return bool(kept) and len(self._kept) < limits.batches

    def count(self) -> tuple[int, int]:
        """Number of batches that were compared as a whole, and of different ones. Reads from the device.

        Both are 0 if every batch holds the same number everywhere: the step has its own data.
        """
        distinct = len({tuple([tuple(one.view(-1).tolist()) for one in parts]) for parts in self._kept})
        if distinct == 1 and all(map(bool, self._constant)):
            return 0, 0
        return len(self._kept), distinct


def _first_numbers(batch: Any, limits: MistakeThresholds) -> Hashable | None:
    """Some numbers of the first field of a batch; ``None`` if they cannot be read at once."""
    field = batch
    if isinstance(batch, dict):
        field = next(iter(batch.values()), None)
    elif isinstance(batch, (list, tuple)) and batch:
        field = batch[0]
    if type(field) is not Tensor or not field.is_cpu:
        return None
    try:
        array = field.numpy()
    except (TypeError, RuntimeError):  # NumPy does not have such tensors
        return None
    return tuple(map(array.item, _places(array.size, limits))) or None


def _some_numbers(tensor: Tensor, limits: MistakeThresholds) -> Tensor:
    flat = tensor.detach().contiguous()
    places = _places(flat.numel(), limits)
    return flat.as_strided((len(places),), (places.step,), flat.storage_offset()).clone()


def _places(count: int, limits: MistakeThresholds) -> range:
    """The places of the numbers that are read of ``count`` numbers."""
    step = max(1, int(limits.spread * count) // limits.numbers_per_batch)
    return range(0, count, step)[: limits.numbers_per_batch]
