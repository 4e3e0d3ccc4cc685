"""A look at the state before every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def before_saves(trainer: Any, look: Callable[[], None]) -> Callable[[], None]:
    """Call ``look`` before ``trainer.save_checkpoint`` collects anything.

    Checkpoint callbacks and users go through it; no hook is called for weights-only saves, and the hook there is comes
    when the state has been collected.

    Returns:
        A function that undoes this.
    """
    original = trainer.save_checkpoint

    @wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        look()
        return original(*args, **kwargs)

    trainer.save_checkpoint = save_checkpoint

    def undo() -> None:
        if vars(trainer).get("save_checkpoint") is save_checkpoint:
            del trainer.save_checkpoint

    return undo
