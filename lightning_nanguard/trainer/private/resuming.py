"""Checks the checkpoint of a resumed fit before any of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_nanguard.act.patches import wrap_method

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
