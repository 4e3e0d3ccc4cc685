from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.training import guard_with, train
from tests.modules import SaveAt


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 5, 9 and 16 of one run, written in this order."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        saves = [SaveAt(step, folder / "files" / f"{step}.ckpt", stop=step == 16) for step in (5, 9, 16)]
        train(guard_with(), *saves)
    return folder / "files"


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies checkpoints of that run, of the given steps, into a folder; gives the newest one."""

    def copy(*steps: int, folder: Path = tmp_path / "checkpoints") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            shutil.copy2(_saved / f"{step}.ckpt", folder / f"{step}.ckpt")
        return folder / f"{steps[-1]}.ckpt"

    return copy
