"""Gives each fit its id and its folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning_nanguard import __version__
from lightning_nanguard.record.base import RunInfo
from lightning_nanguard.record.run_folder import RunFolder, open_run_folder
from lightning_nanguard.record.run_log import CHECKPOINT, new_run_id
from lightning_nanguard.trainer.private.packages import Trainer

_logger = logging.getLogger("lightning_nanguard")


def open_run(
    trainer: Trainer, dirpath: Path | None, run_id: str | None = None, **settings: Any
) -> tuple[RunInfo, RunFolder]:
    """Open the folder of a fit; return the facts about the fit for sinks, and the folder.

    All ranks must call it, because they use the folder of rank 0.

    Args:
        trainer: The trainer.
        dirpath: The folder; ``None`` for ``nanguard`` beside the checkpoints of the trainer's first logger.
        run_id: Id of the run that is resumed.
        settings: The settings of this fit, for the log of the run.
    """
    folder = None
    if trainer.is_global_zero:
        base, shared = (dirpath, False) if dirpath is not None else _beside_checkpoints(trainer)
        base = Path(os.path.abspath(base))  # the user's code may change the working directory
        if getattr(trainer, "fast_dev_run", False):  # writes no files unless there is a record
            name = new_run_id() if run_id is None else run_id
            folder = RunFolder(base / name, name)
        else:
            begin = {"step": trainer.global_step, "version": __version__, **settings, **_resumed_from(trainer, run_id)}
            folder = open_run_folder(base, run_id, shared=shared, begin=begin)
    path, name = trainer.strategy.broadcast((str(folder.path), folder.run_id) if folder is not None else ("", ""))
    info = RunInfo(trainer.global_rank, trainer.world_size, Path(path), name)
    return info, folder or RunFolder(info.dirpath, name)


def _resumed_from(trainer: Trainer, run_id: str | None) -> dict[str, str]:
    """The checkpoint from which a run is resumed, if it is a local file."""
    path = trainer.ckpt_path
    if run_id is None or path is None or not os.path.exists(path):
        return {}
    return {CHECKPOINT: os.path.realpath(path)}


def _beside_checkpoints(trainer: Trainer) -> tuple[Path, bool]:
    """The folder ``nanguard`` beside that of ModelCheckpoint, and whether several runs share it."""
    root = _local(trainer.default_root_dir)
    try:
        logger = trainer.logger
        log_dir = getattr(logger, "log_dir", None)
        if isinstance(log_dir, (str, Path)):
            return _local(log_dir) / "nanguard", False
        if logger is not None and logger.name is not None and logger.version not in (None, ""):
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return _local(logger.save_dir or root) / str(logger.name) / version / "nanguard", False
    except Exception as error:  # the user's logger may raise anything
        kind = type(trainer.logger).__name__
        _logger.warning("NaNGuard: %s does not say where the folder of its run is: %s", kind, error)
    return root / "nanguard", True


def _local(path: Any) -> Path:
    # Records are written to local disks only.
    return Path("." if "://" in str(path) else path)
