"""A look at the checkpoint a fit is about to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Protocol


class Judge(Protocol):
    """Says what to go on from."""

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        """``None`` to leave things as they are, or a file to go on from in its place; it may raise.

        Args:
            path: The file asked for.
            content: What was loaded from it, ``None`` where that failed.
            error: Why it failed.
        """


def before_resuming(trainer: Any, judge: Judge) -> Callable[[], None]:
    """Ask ``judge`` when a checkpoint was loaded and nothing of it has been taken up yet.

    No hook of a callback comes between the two, and none at all where the file cannot be read. Sharded strategies have
    filled the module by then; they fill it again from what the judge chooses.

    Returns:
        A function that undoes this.
    """
    connector = trainer._checkpoint_connector
    original = connector.resume_start

    @wraps(original)
    def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        if not checkpoint_path:
            original(checkpoint_path, *args, **kwargs)
            return
        path = Path(checkpoint_path)
        try:
            original(checkpoint_path, *args, **kwargs)
        except Exception as error:
            chosen = judge(path, None, error)
            if chosen is None:
                raise
        else:
            chosen = judge(path, connector._loaded_checkpoint, None)
        if chosen is not None:
            original(str(chosen), *args, **kwargs)

    connector.resume_start = resume_start

    def undo() -> None:
        if vars(connector).get("resume_start") is resume_start:
            del connector.resume_start

    return undo
