"""`nanguard tail` follows a live run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard import Intervention
from lightning_nanguard.cli.main import main
from lightning_nanguard.cli.tail import NewLines
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_folder import open_run_folder
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.record.data import SKIP, step


def test_what_is_new(tmp_path: Path) -> None:
    """Records come once; a torn line waits until it is whole, and one that is no record is passed over."""
    path = tmp_path / RECORDS_FILE
    lines = NewLines(path)

    def new() -> list[int]:
        return [record.global_step for record in lines.take(Intervention.from_dict)]

    assert new() == []
    sink = JsonLines(path)
    sink.write(step(1))
    sink.write(step(2))
    assert new() == [1, 2]
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b"no record\n" + whole[: len(whole) // 4])
    assert new() == []
    with open(path, "ab") as file:
        file.write(whole[len(whole) // 4 : len(whole) // 2])
    assert new() == [1]


def test_a_file_that_was_put_aside(tmp_path: Path) -> None:
    """Records of a file that was full come before those of the new one, each once, also to who looks later."""
    path = tmp_path / RECORDS_FILE
    sink, lines = JsonLines(path, RecordsThresholds(bytes_per_file=1)), NewLines(path)

    def new(lines: NewLines) -> list[int]:
        return [record.global_step for record in lines.take(Intervention.from_dict)]

    sink.write(step(1))
    assert new(lines) == [1]
    sink.write(step(2))
    assert new(lines) == [2]
    assert new(NewLines(path)) == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    """What is on record is told at once, what comes as it comes, and how the run ended."""
    folder = open_run_folder(tmp_path / "nanguard", None, shared=False, begin={"step": 0})
    sink = JsonLines(folder.path / RECORDS_FILE)
    sink.write(SKIP)
    command: Any = [sys.executable, "-u", "-m", "lightning_nanguard", "tail", str(tmp_path), "--seconds", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        assert told[0] == f"Run {folder.run_id} in {folder.path}: it is still running\n"
        assert told[2] == "  done: skipped the batch\n"
        sink.write(step(413))
        assert "step 413 (epoch 3, batch 12): non-finite gradient again" in process.stdout.readline()
        time.sleep(0.2)
        assert process.poll() is None
        folder.log("end", updates=500, faults={"non_finite_gradient": 2})
        folder.close()
        assert ": 500 updates, 2 interventions" in process.stdout.readline()
        assert process.wait(timeout=30) == 0


def test_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a run is an error that says so."""
    assert main(["tail", str(tmp_path)]) == 2
    assert "there is no run of NaNGuard in" in capsys.readouterr().err
