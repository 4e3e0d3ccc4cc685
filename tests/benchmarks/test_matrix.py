"""The matrix of versions keeps what came of each row; nothing is installed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.matrix import ROWS, Result, table

ROOT = Path(__file__).parents[2]


def test_a_row_without_its_python_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, kept in the place of what was known of the row, and no failure."""
    output = tmp_path / "matrix.json"
    kept = [Result("oldest", "2026-01-01", "3.10", {}, "3 passed", passed=True), Result("newest", "2026-01-01", "3.13")]
    output.write_text(json.dumps([vars(one) for one in kept]))
    assert matrix.main(["oldest", "--python", "9.9", "--output", str(output)]) == 0
    assert "left out: there is no Python 9.9" in capsys.readouterr().out
    results = [Result(**one) for one in json.loads(output.read_text())]
    assert [(one.row, one.passed) for one in results] == [("newest", None), ("oldest", None)]
    assert table(results).splitlines()[-1].startswith("| oldest |")


def test_a_row_has_to_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown name is answered with those that there are."""
    with pytest.raises(SystemExit, match="2"):
        matrix.main(["oldish"])
    assert "there are oldest, " in capsys.readouterr().err


def test_what_was_run_passed() -> None:
    """No row that was run has failed, and each has its versions."""
    results = [Result(**one) for one in json.loads(matrix.RESULTS.read_text())]
    assert {one.row for one in results} <= set(ROWS)
    assert [one.row for one in results if one.passed is False] == []
    assert all(one.versions for one in results if one.passed)


def test_ci_runs_both_ends() -> None:
    """The rows of the workflow are rows of the matrix."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    named = {name for name in ROWS if f"row: {name}," in workflow}
    assert named >= {"oldest", "oldest-lightning", "newest", "newest-lightning"}
