"""Checks the checkpoint of a resumed fit before any of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning_nanguard.act.patches import wrap_method


class Judge(Protocol):
    """Decides from which checkpoint a fit is resumed."""

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        """``None`` to resume from ``path``, or a file to resume from in its place; it may raise.

        Args:
            path: The file that the user asked for.
            content: The loaded content; ``None`` if loading failed.
            error: The exception of a failed load.
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
