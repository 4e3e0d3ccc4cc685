"""Writes the guard's own checkpoints through the trainer, without raising errors in the user's run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_nanguard.act.patches import wrap_method


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
