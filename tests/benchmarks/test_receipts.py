"""The benchmark of receipts compares them with whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rescue.receipts import Compared, agrees, main


def test_it_compares_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One forced intervention and one of the guard's own are compared, shown and written."""
    output = tmp_path / "receipts.json"
    assert main(["--draws", "2", "--seed", "30000", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert len(written["found"]) == 2
    assert [one["what"] == "its own" for one in written["found"]] == [False, True]
    assert "of 2 agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "truth", "share", "right"),
    [
        ("gained", "gained", 0.5, True),
        ("no difference", "gained", 0.07, True),
        ("no difference", "gained", 0.5, False),
        ("gained", "cost", -0.5, False),
        ("cost", "no difference", 0.0, False),
    ],
)
def test_what_counts_as_right(verdict: str, truth: str, share: float, right: bool) -> None:
    """A receipt is right where it says what the whole runs say; a small difference may count as none."""
    assert agrees(Compared("form#1", "a cut", verdict, truth, share)) == right
