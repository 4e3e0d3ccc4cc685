"""Every checkpoint that is saved, by whatever path, is looked at before it is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.trainer.private.patches import undo_all, wrap_method


class Mend(Protocol):
    """Gives what to write in place of a checkpoint."""

    def __call__(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        """The checkpoint, or one that is not poisoned.

        Args:
            checkpoint: What is about to be written.
            path: Where to.
            checked: Whether the state it was collected from has just been looked at.
        """


def guard_saves(
    trainer: Any, before: Callable[[], None], mend: Mend, after: Callable[[], None], *, collects: bool = False
) -> Callable[[], None]:
    """Call ``before`` when a checkpoint is about to be collected, write what ``mend`` gives, then call ``after``.

    Checkpoint callbacks and users call ``trainer.save_checkpoint``. No hook is called for weights-only saves, and the
    hook there is comes when the state has been collected. ``strategy.save_checkpoint`` sees every save, also one that
    a user made a dictionary for. There nothing of the run is changed, since the state may have been collected at any
    time and by one rank alone.

    Args:
        trainer: The trainer.
        before: Makes the state of the run good.
        mend: Makes a dictionary good.
        after: Called when a checkpoint was written.
        collects: Whether ``strategy.save_checkpoint`` writes the present state whatever dictionary it is given, by all
            ranks: then ``before`` and ``after`` are called around it too.

    Returns:
        A function that undoes this.
    """
    strategy = trainer.strategy
    writes_later = _writes_what_is_there_later(strategy)
    looked = False

    def save_checkpoint(collect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal looked
        outer, looked = looked, True
        try:
            before()
            return collect(*args, **kwargs)
        finally:
            looked = outer
            after()

    def write_checkpoint(
        write: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any
    ) -> Any:
        looks = collects and not looked
        try:
            if looks:
                before()
            good = mend(checkpoint, str(filepath), checked=looked or looks)
            return write(mapped(good, _copy) if writes_later else good, filepath, *args, **kwargs)
        finally:
            if looks:
                after()

    return undo_all(
        [
            wrap_method(trainer, "save_checkpoint", save_checkpoint),
            wrap_method(strategy, "save_checkpoint", write_checkpoint),
        ]
    )


def _writes_what_is_there_later(strategy: Any) -> bool:
    """Whether a thread writes tensors that go on changing, as AsyncCheckpointIO of Lightning before 2.5.4 does."""
    classes = type(getattr(strategy, "checkpoint_io", None)).__mro__
    kinds = (kind for kind in classes if kind.__name__ == "AsyncCheckpointIO")
    return any(not hasattr(sys.modules[kind.__module__], "_clone_tensor") for kind in kinds)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
