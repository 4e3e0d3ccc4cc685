"""Finds tensors that code outside of passes and steps has written to, so that repeated updates lack the change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nanguard.state.learner import describe
from lightning_nanguard.state.snapshot import Snapshot


def written_outside(start: Snapshot, first: Snapshot, again: Snapshot) -> str | None:
    """Name of a weight or buffer that changed in the run, and not when its updates were made again; ``None`` without.

    An example is a target network that a hook copies from the trained one every hundred updates. A single element
    does not count: memory corruption changes one, and is what repeated updates undo.

    Args:
        start: The snapshot that the updates were made from.
        first: The state that the run had reached.
        again: The state after the same updates were made again.
    """
    for key, was in start.leaves.items():
        if key[0] in ("parameter", "buffer") and _differs(was, first.leaves.get(key), again.leaves.get(key)):
            return describe(key)
    return None


def _differs(was: Any, first: Any, again: Any) -> bool:
    if not (isinstance(was, Tensor) and isinstance(first, Tensor) and isinstance(again, Tensor)):
        return False
    if not (was.shape == first.shape == again.shape) or any(one.layout != torch.strided for one in (was, first, again)):
        return False
    was, first, again = was.to(again.device), first.to(again.device), again
    return torch.equal(was, again) and int((first != was).sum()) > 1 and bool(torch.isfinite(first).all())
