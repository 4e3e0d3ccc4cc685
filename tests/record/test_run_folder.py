"""No two runs write to one folder, and a resumed run finds its own again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.record.files import LAST_GOOD, RECORDS_FILE
from lightning_nanguard.record.run_folder import LOCK_FILE, RunFolder, is_alive, open_run_folder
from lightning_nanguard.record.run_log import read_run


def take(base: Path, run_id: str | None = None, shared: bool = False) -> RunFolder:
    return open_run_folder(base, run_id, shared=shared, begin={"step": 0})


def taken(base: Path, run_id: str | None = None, shared: bool = False) -> RunFolder:
    folder = take(base, run_id, shared)
    folder.log("end", updates=1)
    folder.close()
    return folder


@contextmanager
def elsewhere(base: Path) -> Iterator[str]:
    """Another process, whose run lives in a folder meanwhile; gives the run's id."""
    code = (
        "import sys, pathlib; from lightning_nanguard.record.run_folder import open_run_folder\n"
        "run = open_run_folder(pathlib.Path(sys.argv[1]), None, shared=False, begin={})\n"
        "print(run.run_id, flush=True); sys.stdin.read()"
    )
    arguments: Any = [sys.executable, "-c", code, str(base)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def test_a_new_run_never_takes_another_ones_folder(tmp_path: Path) -> None:
    """A free folder is taken itself; where it is another run's, the next ones lie below it, by their ids."""
    one, two, three = (taken(tmp_path / "nanguard") for _ in range(3))
    assert one.path == tmp_path / "nanguard"
    assert [two.path, three.path] == [one.path / two.run_id, one.path / three.run_id]
    assert not list(tmp_path.rglob(LOCK_FILE))


def test_a_common_folder_is_nobodys(tmp_path: Path) -> None:
    """Where several runs have a folder in common, each lies below it, the first one too."""
    one, two = (taken(tmp_path, shared=True) for _ in range(2))
    assert [one.path, two.path] == [tmp_path / one.run_id, tmp_path / two.run_id]


@pytest.mark.parametrize("shared", [False, True])
def test_a_resumed_run_goes_back_to_its_own(shared: bool, tmp_path: Path) -> None:
    """By its id it finds the folder it had, above or below others', and the log goes on."""
    folders = [taken(tmp_path, shared=shared) for _ in range(3)]
    for folder in folders:
        again = taken(tmp_path, folder.run_id, shared)
        assert (again.path, again.run_id) == (folder.path, folder.run_id)
        log = read_run(folder.path)
        assert log is not None
        assert len(log.fits) == 2
    moved = taken(tmp_path / "new version", folders[0].run_id, shared)
    assert moved.run_id == folders[0].run_id
    assert moved.path not in [folder.path for folder in folders]


@pytest.mark.parametrize("name", [RECORDS_FILE, LAST_GOOD])
def test_files_of_version_0_1_0_are_left_alone(name: str, tmp_path: Path) -> None:
    """A folder with files of a run that kept no log belongs to that run."""
    (tmp_path / name).write_text("")
    folder = taken(tmp_path)
    assert folder.path == tmp_path / folder.run_id


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    """A second process that goes on from a checkpoint of a live run is a run of its own, and its log names the first;
    when that is killed its folder can be gone back to."""
    with elsewhere(tmp_path) as run_id:
        branch = taken(tmp_path, run_id)
        assert branch.run_id != run_id
        assert branch.path == tmp_path / branch.run_id
        log = read_run(branch.path)
        assert log is not None
        assert log.fits[0]["branch_of"] == run_id
        assert taken(tmp_path).path.parent == tmp_path
    again = taken(tmp_path, run_id)
    assert (again.path, again.run_id) == (tmp_path, run_id)


def test_a_look_at_an_own_run_does_not_unlock_its_folder(tmp_path: Path) -> None:
    """A run may be drawn while it goes on: it is alive for this process and for others, before and after."""
    code = (
        "import sys, pathlib; from lightning_nanguard.record.run_folder import is_alive\n"
        "print(is_alive(pathlib.Path(sys.argv[1])))"
    )

    def seen_elsewhere() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout.strip()

    one = take(tmp_path)
    assert is_alive(tmp_path)
    assert is_alive(tmp_path)
    assert seen_elsewhere() == "True"
    one.log("end", updates=1)
    one.close()
    assert not is_alive(tmp_path)


def test_a_killed_run_that_left_nothing_gives_its_place(tmp_path: Path) -> None:
    """A run killed before it left a last good file is begun anew in the same folder, under a new id; what it saved
    elsewhere stays known as its own."""
    one = take(tmp_path)
    one.saved("old.ckpt", 2)
    one.close()
    two = take(tmp_path)
    assert (two.path, two.run_id == one.run_id) == (one.path, False)
    two.saved("x.ckpt", 3)
    two.close()
    log = read_run(tmp_path)
    assert log is not None
    assert (log.run_id, len(log.fits)) == (two.run_id, 1)
    assert [run for _, run in log.saved.values()] == [one.run_id, two.run_id]
    (tmp_path / LAST_GOOD).write_text("a checkpoint")
    assert taken(tmp_path).path.parent == tmp_path


def test_nothing_can_be_written(tmp_path: Path) -> None:
    """A folder that cannot be made costs nothing, and its place is free of others' files."""
    (tmp_path / "file").write_text("")
    folder = take(tmp_path / "file" / "nanguard")
    folder.log("end")
    folder.saved("x.ckpt", 3)
    folder.close()
    assert folder.path == tmp_path / "file" / "nanguard"


def test_saves_are_told_from_the_folder(tmp_path: Path) -> None:
    """A save is in the log once, by a path that stays right when everything is moved."""
    folder = take(tmp_path / "old" / "nanguard")
    for _ in range(2):
        folder.saved(str(tmp_path / "old" / "checkpoints" / "x.ckpt"), 3)
    folder.close()
    (tmp_path / "old").rename(tmp_path / "new")
    log = read_run(tmp_path / "new" / "nanguard")
    assert log is not None
    assert len(log.saved) == 1
    assert log.saved_by(tmp_path / "new" / "checkpoints" / "x.ckpt") == (*log.saved.values(),)[0]
