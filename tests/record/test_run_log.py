"""The log of a run says which run it is, what it saved and how it ended, and in which folders it lay before."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_nanguard import Intervention
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_log import (
    RUN_FILE,
    RunLog,
    append_event,
    earlier_parts,
    find_runs,
    interventions_of_resumed,
    new_run_id,
    read_run,
    seen_from,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Beginnings, saves and the end are read back; numbers that are not finite do not spoil a line."""
    append_event(tmp_path, "fit", {"run": "a", "step": 0})
    append_event(tmp_path, "save", {"run": "a", "path": "../x.ckpt", "step": 7})
    log = read_run(tmp_path)
    assert log is not None
    assert (log.folder, log.run_id, log.ended) == (tmp_path, "a", None)
    assert log.saved_by(tmp_path.parent / "x.ckpt") == log.saved["../x.ckpt"]
    assert log.saved["../x.ckpt"][1] == "a"
    assert log.saved_by(tmp_path / "x.ckpt") is None
    append_event(tmp_path, "end", {"updates": 9, "loss": float("nan")})
    ended = read_run(tmp_path)
    assert ended is not None
    assert ended.ended is not None
    assert (ended.ended["updates"], ended.ended["loss"]) == (9, "NaN")
    append_event(tmp_path, "fit", {"run": "a", "step": 5})
    resumed = read_run(tmp_path)
    assert resumed is not None
    assert [fit["step"] for fit in resumed.fits] == [0, 5]
    assert resumed.ended is None


def test_torn_and_strange_lines_are_left_out(tmp_path: Path) -> None:
    """A line cut short by a killed run costs that line alone; what is no log is none."""
    assert read_run(tmp_path) is None
    (tmp_path / RUN_FILE).write_bytes(b"\xff\xfe no log\n[1]\n" + b'{"event": "fit", "run": 3}\n')
    assert read_run(tmp_path) is None
    append_event(tmp_path, "fit", {"run": "a"})
    with open(tmp_path / RUN_FILE, "ab") as file:
        file.write(b'{"event": "save", "pa')
    append_event(tmp_path, "end", {"updates": 3})
    log = read_run(tmp_path)
    assert log is not None
    assert (log.run_id, log.saved) == ("a", {})
    assert log.ended is not None


def test_runs_are_found_in_order(tmp_path: Path) -> None:
    """All runs below a folder are found, the one begun or resumed last at the end; no two ids are alike."""
    for place, run, when in (("b/nanguard", "2", 20.5), ("a", "1", 10), ("a/deeper", "3", 30), ("a/resumed", "1", 40)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        append_event(tmp_path / place, "fit", {"run": run, "time": when})
    found = find_runs(tmp_path)
    assert [run.run_id for run in found] == ["1", "2", "3", "1"]
    assert [run.begun for run in found] == [10.0, 20.5, 30.0, 40.0]
    assert RunLog(tmp_path, "x", ({"time": "yesterday"},)).begun == RunLog(tmp_path, "x").begun == 0.0
    assert len({new_run_id() for _ in range(100)}) == 100


def part(folder: Path, run: str, checkpoint: Path | None = None) -> RunLog:
    """A part of a run in a folder, gone on from a checkpoint."""
    folder.mkdir(parents=True)
    begin = {"run": run, "step": 0} if checkpoint is None else {"run": run, "step": 5, "checkpoint": checkpoint}
    append_event(folder, "fit", seen_from(folder, begin))
    log = read_run(folder)
    assert log is not None
    return log


def test_the_folders_of_a_run(tmp_path: Path) -> None:
    """Each part is found beside the checkpoint that the next one was resumed from, also after all were moved together;
    a checkpoint of another run leads nowhere."""
    logs = tmp_path / "logs"
    part(logs / "version_0" / "nanguard", "a")
    part(logs / "version_1" / "nanguard", "a", logs / "version_0" / "checkpoints" / "last.ckpt")
    last = part(logs / "version_2" / "nanguard" / "a", "a", logs / "version_1" / "nanguard" / "last.ckpt")
    deeper = part(logs / "version_3", "a", logs / "version_2" / "nanguard" / "last.ckpt")
    assert [log.folder.relative_to(logs).parts[0] for log in earlier_parts(last)] == ["version_0", "version_1"]
    assert len(earlier_parts(deeper)) == 3
    other = part(logs / "version_4" / "nanguard", "b", logs / "version_0" / "checkpoints" / "last.ckpt")
    assert earlier_parts(other) == []
    shutil.move(logs, tmp_path / "moved")
    moved = read_run(tmp_path / "moved" / "version_1" / "nanguard")
    assert moved is not None
    assert [log.folder for log in earlier_parts(moved)] == [tmp_path / "moved" / "version_0" / "nanguard"]


def test_the_interventions_of_a_resumed_run(tmp_path: Path) -> None:
    """Those of all its folders are counted; of a run that was not resumed there is nothing to add."""
    one, two = tmp_path / "one", tmp_path / "two"
    part(one, "a")
    skipped = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
    JsonLines(one / RECORDS_FILE).write(skipped)
    assert interventions_of_resumed(one) is None
    assert interventions_of_resumed(tmp_path) is None
    part(two, "a", one / "last.ckpt")
    assert interventions_of_resumed(two) == 1
    JsonLines(two / RECORDS_FILE).write(skipped)
    append_event(two, "fit", {"run": "a", "step": 9})
    assert interventions_of_resumed(two) == 2


def test_a_run_that_goes_in_a_circle(tmp_path: Path) -> None:
    """A folder resumed into itself, and logs that name each other, end; what is no path is passed over."""
    itself = part(tmp_path / "itself", "a", tmp_path / "itself" / "last.ckpt")
    assert earlier_parts(itself) == []
    one = part(tmp_path / "one", "b", tmp_path / "two" / "last.ckpt")
    part(tmp_path / "two", "b", tmp_path / "one" / "last.ckpt")
    assert [log.folder.name for log in earlier_parts(one)] == ["two"]
    assert earlier_parts(RunLog(tmp_path, "a")) == earlier_parts(RunLog(tmp_path, "a", ({"checkpoint": 7},))) == []
