"""Single samples of a batch that torch's ``default_collate`` has put together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_nanguard.measure.batches import mapped, named_tensors
from lightning_nanguard.measure.tensors import is_plain


def is_separable(batch: Any, count: int) -> bool:
    """Whether every tensor of a batch has one entry a sample, and there is one.

    Args:
        batch: The batch.
        count: Number of samples.
    """
    tensors = [tensor for _, tensor in named_tensors(batch)]
    return bool(tensors) and all(is_plain(one) and one.dim() > 0 and len(one) == count for one in tensors)


def part_of(batch: Any, indices: Sequence[int]) -> Any:
    """The batch that the loader would have given for some of the samples.

    Args:
        batch: A batch that is separable.
        indices: The samples, in this order.
    """
    chosen = list(indices)
    count = next(len(tensor) for _, tensor in named_tensors(batch))

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[torch.tensor(chosen, device=value.device)]
        # What is no number, default_collate leaves in lists.
        whole = len(value) == count and not any(isinstance(one, (Tensor, list, tuple, dict)) for one in value)
        return type(value)(value[one] for one in chosen) if whole else value

    return _picked(mapped(batch, pick), pick)


def _picked(value: Any, pick: Any) -> Any:
    """Lists of words cut like the tensors beside them."""
    if isinstance(value, dict):
        return type(value)({key: _picked(one, pick) for key, one in value.items()}) if type(value) is dict else value
    if type(value) in (list, tuple):
        if value and all(isinstance(one, (str, bytes)) for one in value):
            return pick(value)
        return type(value)(_picked(one, pick) for one in value)
    return value


def hash_of(batch: Any, index: int) -> str:
    """The hash of one sample of a batch: of the bytes of its tensors.

    Args:
        batch: The batch.
        index: The sample.
    """
    made = hashlib.sha256()
    count: int | None = None
    for _, tensor in named_tensors(batch):
        if not is_plain(tensor) or not tensor.dim():
            continue
        count = len(tensor) if count is None else count
        if len(tensor) != count:
            continue
        one = tensor[index].detach().cpu().contiguous()
        made.update(f"{one.dtype} {tuple(one.shape)}".encode())
        made.update(one.reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]


def sample_hash(sample: Any) -> str:
    """The hash by which records name a sample whose data set has no rows.

    Args:
        sample: What the data set gives for one sample, as it goes into torch's ``default_collate``.

    Example:
        >>> sample_hash((torch.zeros(2), 1)) == hash_of([torch.zeros(1, 2), torch.tensor([1])], 0)
        True
    """
    return hash_of(default_collate([sample]), 0)
