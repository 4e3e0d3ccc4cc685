"""Writing the last good checkpoint through the trainer, behind all other callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, final

from lightning_nanguard.trainer.private.packages import Callback


@final
class _Afterwards(Callback):
    """Called when a batch is over for all other callbacks: an average is then up to date."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._function()


def after_every_batch(trainer: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` at the end of every training batch, behind all callbacks.

    Returns:
        A function that undoes this.
    """
    last = _Afterwards(function)
    # Replaced rather than changed: Lightning may be walking over the list.
    trainer.callbacks = [*trainer.callbacks, last]

    def undo() -> None:
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not last]

    return undo


def write_through(trainer: Any, path: Path) -> None:
    """Save a checkpoint as the trainer does, with whatever strategy and plugin it has."""
    try:
        trainer.save_checkpoint(path)
    except Exception:
        # The other ranks wait for this one where saving ends.
        trainer.strategy.barrier("NaNGuard.write_through")
        raise


def forgive(strategy: Any, path: Path, failed: Callable[[Exception], None]) -> Callable[[], None]:
    """Keep errors in writing ``path`` to ``failed``: a plugin that writes in the background raises them in a later
    save of the user's, or at the end of the run.

    Returns:
        A function that undoes this.
    """
    plugin: Any = getattr(strategy, "checkpoint_io", None)
    while (inner := getattr(plugin, "checkpoint_io", None)) is not None:
        plugin = inner
    if plugin is None:
        return lambda: None
    original = plugin.save_checkpoint

    @wraps(original)
    def save_checkpoint(checkpoint: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        if str(filepath) != str(path):
            return original(checkpoint, filepath, *args, **kwargs)
        try:
            return original(checkpoint, filepath, *args, **kwargs)
        except Exception as error:
            failed(error)

    plugin.save_checkpoint = save_checkpoint

    def undo() -> None:
        if vars(plugin).get("save_checkpoint") is save_checkpoint:
            del plugin.save_checkpoint

    return undo
