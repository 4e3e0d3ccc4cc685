"""`nanguard report` writes the page of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import RECORDS_FILE
from tests.helpers import fit, task, with_bad

pytest.importorskip("matplotlib")


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of a run lies in its folder, or where it is asked for. Without its records no run is called healthy."""
    guard = NaNGuard()
    fit(task(), with_bad(4, count=8), guard, folder=tmp_path)
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    assert guard.run_dir is not None
    assert capsys.readouterr().out.strip() == str(guard.run_dir / "report.html")
    text = (guard.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Saved: 1 intervention." in text
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert "Saved: 1 intervention." in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert main(["report", str(guard.run_dir), "-o", str(tmp_path / "new")]) == 0
    assert "Saved: 1 intervention." in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    (guard.run_dir / RECORDS_FILE).unlink()
    assert main(["report", str(guard.run_dir), "-o", str(tmp_path / "new")]) == 0
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "Not known: 1 intervention of the run cannot be read." in text


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a run is an error."""
    assert main(["report", str(tmp_path)]) == 2
    assert "there is no run of NaNGuard in" in capsys.readouterr().err
