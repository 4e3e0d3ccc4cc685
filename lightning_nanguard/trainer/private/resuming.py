"""Looking at the checkpoint that a fit is about to be resumed from, before anything of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning_nanguard.trainer.private.patches import wrap_method


class Judge(Protocol):
    """Decides which checkpoint a fit is resumed from."""

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        """``None`` to resume from ``path``, or a file to resume from in its place; it may raise.

        Args:
            path: The file asked for.
            content: What was loaded from it, ``None`` if that failed.
            error: Why it failed.
        """


def before_resuming(trainer: Any, judge: Judge) -> Callable[[], None]:
    """Ask ``judge`` when a checkpoint was loaded and nothing of it has been used yet.

    No hook of a callback comes between the two, and none at all where the file cannot be read. Sharded strategies have
    filled the module by then; they fill it again from what the judge chooses.

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
