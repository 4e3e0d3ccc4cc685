"""`nanguard compare` lays runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.curve import CURVE_FILE
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.run_log import RUN_FILE
from tests.helpers import batches, fit, task, with_bad


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a column for each run and names the settings that differ; a page is written where asked for."""
    fit(task(), with_bad(4, count=8), NaNGuard(), folder=tmp_path / "one")
    fit(task(), batches(count=8), NaNGuard(max_snapshots=2), folder=tmp_path / "two")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines[0]) == 2
    for line in (
        ["outcome", "Saved", "Healthy"],
        ["batches", "skipped", "1", "0"],
        ["NaNGuard:", "max_snapshots", "default", "2"],
    ):
        assert line in lines
    pytest.importorskip("matplotlib")
    page = tmp_path / "new" / "page.html"
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "2 runs compared" in page.read_text(encoding="utf-8")
    lost = next((tmp_path / "one").rglob(RECORDS_FILE))
    lost.unlink()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["outcome", "Not", "known", "Healthy"] in lines
    assert ["interventions", "0", "and", "1", "that", "cannot", "be", "read", "0"] in lines


def test_files_that_are_missing_or_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without curves, steps and losses are not known, which is said; a damaged log is told from a missing one."""
    for name in ("one", "two"):
        fit(task(), batches(count=8), NaNGuard(dirpath=tmp_path / name))
    (tmp_path / "one" / CURVE_FILE).unlink()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr()
    assert ["steps", "–", "8"] in [line.split() for line in shown.out.splitlines()]
    assert f"nanguard: there is no curve.csv in {tmp_path / 'one'}: its steps and losses are not known" in shown.err
    assert "loss at step" not in shown.out
    (tmp_path / "one" / RUN_FILE).write_text("garbage")
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert f"{tmp_path / 'one' / RUN_FILE} is damaged" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a run, and one run named twice, are errors."""
    fit(task(), batches(count=4), NaNGuard(), folder=tmp_path / "one")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "empty")]) == 2
    assert f"there is no run of NaNGuard in {tmp_path / 'empty'}" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path / "one")]) == 2
    assert "compare takes the newest run of each folder: name two or more folders of runs" in capsys.readouterr().err
