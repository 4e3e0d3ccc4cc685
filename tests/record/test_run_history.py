"""A run that was resumed into another folder finds the folders that it lay in before."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_nanguard import Intervention
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_history import earlier_parts, interventions_of_resumed, seen_from
from lightning_nanguard.record.run_log import RunLog, append_event, read_run


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
