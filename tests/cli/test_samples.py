"""``nanguard samples`` lists the bad samples of runs, for people and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard.cli import main
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, BadSample
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_log import RUN_FILE, append_event, seen_from
from lightning_nanguard.types import Finding, Intervention

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
        "  row 100: not finite in field 0, column 2; seen 2 times, first at step 0, epoch 0, batch 6, sample 4",
        f"{runs / 'b'}: 2 bad samples",
        "  row 7: x\\x1b[2J in field 0, column 2; seen at step 0, epoch 0, batch 6, sample 4",
        "  row 100: not finite in field 0, column 2; seen at step 0, epoch 0, batch 6, sample 4",
    ]


def test_as_csv(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each sample of all the runs, with how often they met it, or of the file that is given."""
    assert main(["samples", str(runs), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["row"], row["times"], row["cause"]) for row in rows] == [
        ("7", "1", "x\\x1b[2J"),
        ("100", "3", "not finite"),
    ]
    assert main(["samples", str(runs / "a" / BAD_SAMPLES_FILE), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_that_was_resumed_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample that a run met in the folder before it was resumed is told with the one it was resumed into, from its
    first meeting on, and a step that was trained again counts; the run is not told twice."""
    before, folder = (tmp_path / name / "nanguard" for name in ("version_0", "version_1"))
    sample = replace(ONE, global_step=7, run="a-run")
    for where, begin, met in (
        (before, {"run": "a-run", "step": 0}, [sample, replace(sample, epoch=1, global_step=27, times=2)]),
        (folder, {"run": "a-run", "step": 20, "checkpoint": before / "last.ckpt"}, [replace(sample, epoch=1, times=2)]),
    ):
        sink = JsonLines(where / BAD_SAMPLES_FILE)
        for one in met:
            sink.write(one)
        sink.close()
        append_event(where, "fit", seen_from(where, begin))
    for asked in (folder, tmp_path):
        assert main(["samples", str(asked)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{folder} (and before it was resumed in {before}): 1 bad sample",
            "  row 100: not finite in field 0, column 2; seen 3 times, first at step 7, epoch 0, batch 6, sample 4",
        ]


def test_a_damaged_list(runs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """A file without a readable sample is an error, and not called a run without bad samples."""
    file = runs / "a" / BAD_SAMPLES_FILE
    file.write_text("garbage\n")
    assert main(["samples", str(runs)]) == 2
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if "bad sample" in line] == [f"{runs / 'b'}: 2 bad samples"]
    assert f"nanguard: {file}: no bad sample in it can be read" in shown.err
    assert f"{file}: ignored line 1" in caplog.text


def test_none_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that met none says so; a folder without a run is an error."""
    assert main(["samples", str(tmp_path)]) == 2
    assert "there is no run of NaNGuard in" in capsys.readouterr().err
    (tmp_path / RUN_FILE).write_text("{}\n")
    assert main(["samples", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nanguard: no bad sample was found\n"


def test_rows_that_explain_names_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample of a record, whose loss failed, need not be bad."""
    (tmp_path / RUN_FILE).write_text("{}\n")
    finding = Finding("log_of_zero", 0.9, samples=(3,), rows=(103,))
    JsonLines(tmp_path / RECORDS_FILE).write(
        Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1, finding=finding)
    )
    assert main(["samples", str(tmp_path)]) == 0
    assert "Rows that explain names are samples whose loss or gradient failed" in capsys.readouterr().out
