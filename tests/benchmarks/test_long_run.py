"""A long run in which nothing may grow: a short one; `make long` has the long one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import long_run
from benchmarks.long_run import FAULTS, Reading, grown

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_nothing_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fault is met and survived, each tenth is read, and the commands tell of the run."""
    output = tmp_path / "figures.json"
    status = long_run.main(["--steps", "800", "--every", "80", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert status == bool(figures["grown"])
    # Other tests beside this one take memory and time.
    assert [one for one in figures["grown"] if "tensors" in one] == []
    assert [one["steps"] for one in figures["readings"]] == list(range(80, 801, 80))
    assert figures["readings"][-1]["interventions"] == 800 // 80
    assert set(figures["seconds"]) == {"explain", "report"}
    assert "nanguard explain" in capsys.readouterr().out
    assert len(FAULTS) == 4


def test_growth_shows() -> None:
    """More memory, more tensors and slower steps at the end than early on are told."""
    early = Reading(100, 400.0, 300, 1.0, 10.0, 1)
    steady = [early] * 9
    assert grown([*steady, early]) == []
    assert "memory grew" in grown([*steady, replace(early, memory=500.0)])[0]
    assert "tensors are alive" in grown([*steady, replace(early, tensors=900)])[0]
    assert "a step takes" in grown([*steady[:7], *[replace(early, step=2.0)] * 3])[0]


def test_the_long_run_that_was_made() -> None:
    """The figures that the documents name."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "long-run.json").read_text())
    assert figures["grown"] == []
    assert figures["readings"][-1]["interventions"] >= figures["steps"] // figures["every"] >= 1000
    assert max(figures["seconds"].values()) < 20
