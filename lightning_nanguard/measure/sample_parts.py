"""Selects single samples of a batch that was made by torch's ``default_collate``."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_nanguard.measure.batches import mapped, named_tensors
from lightning_nanguard.measure.tensors import is_plain
from lightning_nanguard.thresholds.fixed import HASHED_FIRST


def is_separable(batch: Any, count: int) -> bool:
    """Whether a batch has tensors, and every one has one entry for each sample.

    Args:
        batch: The batch.
        count: Number of samples.
    """
    tensors = [tensor for _, tensor in named_tensors(batch)]
    return bool(tensors) and all(is_plain(one) and one.dim() > 0 and len(one) == count for one in tensors)


def select_samples(batch: Any, indices: Sequence[int]) -> Any:
    """The batch that the loader would have made from some of the samples.

    Args:
        batch: A separable batch.
        indices: Indices of the samples, in this order.
    """
    chosen = list(indices)
    count = next(len(tensor) for _, tensor in named_tensors(batch))

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[torch.tensor(chosen, device=value.device)]
        # default_collate leaves values that are not numbers in lists.
        whole = len(value) == count and not any(isinstance(one, (Tensor, list, tuple, dict)) for one in value)
        return type(value)(value[one] for one in chosen) if whole else value

    return _picked(mapped(batch, pick), pick)


def among(batch: Any, others: Any) -> Any:
    """A batch of the first sample of a separable batch and all samples of another; ``None`` if these do not fit.

    Example:
        >>> among([torch.ones(1, 2)], [torch.zeros(2, 2)])
        [tensor([[1., 1.],
                [0., 0.],
                [0., 0.]])]
    """
    theirs = dict(named_tensors(others))
    count = next((len(tensor) for tensor in theirs.values() if tensor.dim()), 0)
    made = select_samples(batch, [0] * (count + 1))
    for name, tensor in named_tensors(made):
        other = theirs.get(name)
        if other is None or not is_plain(other) or other.shape != (count, *tensor.shape[1:]):
            return None
        tensor[1:] = other
    return made


def _picked(value: Any, pick: Any) -> Any:
    """Select the samples in lists of words too."""
    if isinstance(value, dict):
        return type(value)({key: _picked(one, pick) for key, one in value.items()}) if type(value) is dict else value
    if type(value) in (list, tuple):
        if value and all(isinstance(one, (str, bytes)) for one in value):
            return pick(value)
        return type(value)(_picked(one, pick) for one in value)
    return value


def hash_of(batch: Any, index: int) -> str:
    """The hash of one sample of a batch. The first half covers some of its numbers, the second half all of them.

    Args:
        batch: The batch.
        index: The sample.
    """
    one = [tensor[index : index + 1] for tensor in _by_sample(batch)]
    made = hashlib.sha256()
    for tensor in one:
        made.update(f"{tensor.dtype} {tuple(tensor.shape[1:])}".encode())
        made.update(_bytes(tensor).numpy().tobytes())
    return _first_halves(one)[0] + made.hexdigest()[:8]


def found_again(batch: Any, hashes: Collection[str]) -> list[int]:
    """Indices of the samples of a batch whose hash is in ``hashes``.

    Args:
        batch: The batch.
        hashes: Results of :func:`hash_of`.
    """
    firsts = {one[:8] for one in hashes}
    likely = (index for index, first in enumerate(_first_halves(_by_sample(batch))) if first in firsts)
    return [index for index in likely if hash_of(batch, index) in hashes]


def _by_sample(batch: Any) -> list[Tensor]:
    tensors = [one.detach() for _, one in named_tensors(batch) if is_plain(one) and one.dim()]
    return [one for one in tensors if len(one) == len(tensors[0])]


def _bytes(tensor: Tensor) -> Tensor:
    """One row of bytes for each sample."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8)


def _first_halves(tensors: Sequence[Tensor]) -> list[str]:
    # This runs on every batch if samples are left out by hash. To hash all numbers would take too long.
    few = []
    for tensor in tensors:
        flat = tensor.reshape(len(tensor), -1)
        size = flat.shape[1]
        few.append(_bytes(flat[:, torch.arange(0, size, max(1, size // HASHED_FIRST), device=flat.device)]))
    return [f"{zlib.crc32(row.tobytes()):08x}" for row in torch.cat(few, 1).numpy()] if few else []


def sample_hash(sample: Any) -> str:
    """The hash that identifies a sample in records if its data set has no rows.

    Args:
        sample: One sample of the data set, as it is passed to torch's ``default_collate``.

    Example:
        >>> sample_hash((torch.zeros(2), 1)) == hash_of([torch.zeros(1, 2), torch.tensor([1])], 0)
        True
    """
    return hash_of(default_collate([sample]), 0)
