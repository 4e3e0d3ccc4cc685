"""``nanguard samples`` lists the bad samples of runs, for people and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard.cli import main
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, BadSample
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_log import RUN_FILE

ONE = BadSample("not finite", 100, "ab12", {"0": (2,)}, batch=6, index=4)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, which met the same row."""
    for name, met in (("a", [ONE, replace(ONE, times=2)]), ("b", [replace(ONE, row=7, cause="x\x1b[2J"), ONE])):
        sink = JsonLines(tmp_path / name / BAD_SAMPLES_FILE)
        for one in met:
            sink.write(one)
        sink.close()
    return tmp_path


def test_lists_each_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run with its samples in the order of their rows, and no control character of a file."""
    assert main(["samples", str(runs)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"{runs / 'a'}: 1 bad sample",
        "  row 100: not finite in field 0, column 2; seen 2 times, first in epoch 0, batch 6, sample 4",
        f"{runs / 'b'}: 2 bad samples",
        "  row 7: x\\x1b[2J in field 0, column 2; seen in epoch 0, batch 6, sample 4",
        "  row 100: not finite in field 0, column 2; seen in epoch 0, batch 6, sample 4",
    ]


def test_as_csv(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each sample of all the runs, or of the file that is given."""
    assert main(["samples", str(runs), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["row"], row["times"], row["cause"]) for row in rows] == [
        ("7", "1", "x\\x1b[2J"),
        ("100", "2", "not finite"),
    ]
    assert main(["samples", str(runs / "a" / BAD_SAMPLES_FILE), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_none_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that met none says so; a folder without a run is an error."""
    assert main(["samples", str(tmp_path)]) == 2
    assert "there is no run of NaNGuard in" in capsys.readouterr().err
    (tmp_path / RUN_FILE).write_text("{}\n")
    assert main(["samples", str(tmp_path)]) == 0
    assert "no bad sample was found" in capsys.readouterr().out
