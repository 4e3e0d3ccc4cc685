"""A look at the state before every checkpoint, and at every checkpoint before it is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from torch import Tensor

from lightning_nanguard.measure.batches import mapped


class Mend(Protocol):
    """Gives what to write in the place of a checkpoint."""

    def __call__(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        """The checkpoint, or one that is not poisoned."""


def guard_saves(
    trainer: Any, look: Callable[[], None], mend: Mend, done: Callable[[], None], *, collects: bool = False
) -> Callable[[], None]:
    """Call ``look`` before ``trainer.save_checkpoint`` collects anything, write what ``mend`` gives, call ``done``.

    Checkpoint callbacks and users go through the trainer; no hook is called for weights-only saves, and the hook there
    is comes when the state has been collected. ``strategy.save_checkpoint`` sees every save, also one that a user made
    a dictionary for: the last line, where nothing of the run is changed, since the state may have been collected at
    any time and by one rank alone.

    Args:
        trainer: The trainer.
        look: Sees to it that the state is good.
        mend: Sees to it that a dictionary is.
        done: Called when a checkpoint was written.
        collects: Whether ``strategy.save_checkpoint`` writes the state of now whatever dictionary it is given, by all
            ranks: then ``look`` and ``done`` are called around it too.

    Returns:
        A function that undoes this.
    """
    strategy = trainer.strategy
    writes_later = _writes_what_is_there_later(strategy)
    collect, write = trainer.save_checkpoint, strategy.save_checkpoint
    looked = False

    @wraps(collect)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        nonlocal looked
        look()
        before, looked = looked, True
        try:
            return collect(*args, **kwargs)
        finally:
            looked = before
            done()

    @wraps(write)
    def write_checkpoint(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        ours = collects and not looked
        if ours:
            look()
        try:
            good = mend(checkpoint, str(filepath), checked=looked or ours)
            return write(mapped(good, _copy) if writes_later else good, filepath, *args, **kwargs)
        finally:
            if ours:
                done()

    trainer.save_checkpoint = save_checkpoint
    strategy.save_checkpoint = write_checkpoint

    def undo() -> None:
        for owner, ours in ((trainer, save_checkpoint), (strategy, write_checkpoint)):
            if vars(owner).get("save_checkpoint") is ours:
                del owner.save_checkpoint

    return undo


def _writes_what_is_there_later(strategy: Any) -> bool:
    """Whether a thread writes tensors that go on changing, as AsyncCheckpointIO of Lightning before 2.5.4 does."""
    classes = type(getattr(strategy, "checkpoint_io", None)).__mro__
    kinds = (kind for kind in classes if kind.__name__ == "AsyncCheckpointIO")
    return any(not hasattr(sys.modules[kind.__module__], "_clone_tensor") for kind in kinds)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
