"""Checks every checkpoint before it is written, whoever saves it, and before a fit is resumed from it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_nanguard.act.patches import undo_all, wrap_method
from lightning_nanguard.errors import has_to_be_raised
from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.trainer.private.strategies import collects

_logger = logging.getLogger("lightning_nanguard")


class Mend(Protocol):
    """Returns the checkpoint to write."""

    def __call__(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        """The checkpoint, or one that is not poisoned.

        Args:
            checkpoint: The checkpoint that is about to be written.
            path: The file or folder that it is written to.
            checked: Whether the state that it was collected from has just been checked.
        """


def guard_saves(trainer: Any, before: Callable[[], None], mend: Mend, after: Callable[[], None]) -> Callable[[], None]:
    """Call ``before`` when a checkpoint is about to be collected, write the result of ``mend``, then call ``after``.

    Checkpoint callbacks and users call ``trainer.save_checkpoint``. Hooks are not enough: there is none for
    weights-only saves, and others come after the state is collected. ``strategy.save_checkpoint`` is called in every
    save, including a save of the user's own dictionary. In this method the run is not changed, because the state may be
    old or from one rank only. Where it ignores its dictionary and writes the present state from all ranks, ``before``
    and ``after`` are called around it, too.

    Args:
        trainer: The trainer.
        before: Makes the state of the run good.
        mend: Makes a dictionary good.
        after: Called when a checkpoint was written.

    Returns:
        A function that undoes this.
    """
    strategy = trainer.strategy
    safely = partial(_unless_it_fails, trainer)
    writes_later = _writes_what_is_there_later(strategy)
    looked = False

    def save_checkpoint(collect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal looked
        outer, looked = looked, True
        try:
            safely(before)
            return collect(*args, **kwargs)
        finally:
            looked = outer
            safely(after)

    def write_checkpoint(
        write: Callable[..., Any], checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any
    ) -> Any:
        looks = collects(trainer) and not looked
        try:
            if looks:
                safely(before)
            mended = safely(partial(mend, checkpoint, str(filepath), checked=looked or looks))
            good = checkpoint if mended is None else mended
            return write(mapped(good, _copy) if writes_later else good, filepath, *args, **kwargs)
        finally:
            if looks:
                safely(after)

    return undo_all(
        [
            wrap_method(trainer, "save_checkpoint", save_checkpoint),
            wrap_method(strategy, "save_checkpoint", write_checkpoint),
        ]
    )


def _unless_it_fails(trainer: Any, call: Callable[[], Any]) -> Any:
    """Call a function of the guard. If it fails, the checkpoint is written as without the guard."""
    try:
        return call()
    except Exception as error:
        if has_to_be_raised(error, trainer.world_size):
            raise
        _logger.error(
            "NaNGuard: the guard failed while a checkpoint was saved with %s: %s. The checkpoint is written without "
            "it. Please report this with the traceback.",
            type(error).__name__,
            error,
            exc_info=error,
        )
        return None


def _writes_what_is_there_later(strategy: Any) -> bool:
    """Whether a thread writes tensors that training still changes, as in AsyncCheckpointIO before Lightning 2.5.4."""
    classes = type(getattr(strategy, "checkpoint_io", None)).__mro__
    kinds = (kind for kind in classes if kind.__name__ == "AsyncCheckpointIO")
    return any(not hasattr(sys.modules[kind.__module__], "_clone_tensor") for kind in kinds)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def write_checkpoint(trainer: Any, path: Path) -> None:
    """Save a checkpoint as the trainer does, with its strategy and plugins."""
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except Exception:
        # The other ranks wait in this barrier at the end of saving.
        trainer.strategy.barrier("NaNGuard.write_checkpoint")
        raise


def catch_write_errors(strategy: Any, path: Path, failed: Callable[[Exception], None]) -> Callable[[], None]:
    """Pass errors in writing ``path`` to ``failed`` instead of raising them.

    A plugin that writes in the background would raise them in a later save of the user, or at the end of the run.

    Returns:
        A function that undoes this.
    """
    plugin: Any = getattr(strategy, "checkpoint_io", None)
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    if plugin is None:
        return lambda: None

    def save(original: Callable[..., Any], checkpoint: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        if str(filepath) != str(path):
            return original(checkpoint, filepath, *args, **kwargs)
        try:
            return original(checkpoint, filepath, *args, **kwargs)
        except Exception as error:
            failed(error)

    return wrap_method(plugin, "save_checkpoint", save)


Judge = Callable[[Path, Mapping[str, Any] | None, Exception | None], Path | None]
"""Decides from which checkpoint a fit is resumed.

It gets the file that the user asked for, its content (``None`` if loading failed) and the exception of a failed load.
It returns ``None`` or a file to resume from instead, or it raises.
"""


def before_resuming(trainer: Any, judge: Judge) -> Callable[[], None]:
    """Call ``judge`` after a checkpoint was loaded and before any of it is used.

    No callback hook is called between the two, and none at all if the file cannot be read. Sharded strategies have
    already loaded the module. They load it again from the file that the judge chooses.

    Returns:
        A function that undoes this.
    """
    connector = trainer._checkpoint_connector

    def resume_start(load: Callable[..., None], checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        if not checkpoint_path:
            load(checkpoint_path, *args, **kwargs)
            return
        path = Path(checkpoint_path)
        try:
            load(checkpoint_path, *args, **kwargs)
        except Exception as error:
            chosen = judge(path, None, error)
            if chosen is None:
                raise
        else:
            chosen = judge(path, connector._loaded_checkpoint, None)
        if chosen is not None:
            load(str(chosen), *args, **kwargs)

    return wrap_method(connector, "resume_start", resume_start)
