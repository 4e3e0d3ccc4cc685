"""Transient faults: a short campaign; `python -m benchmarks.transient` has the long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.transient import __main__ as command
from benchmarks.transient.__main__ import is_same
from benchmarks.transient.draws import KINDS, draw
from benchmarks.transient.running import Strike, outcome

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("number", range(12))
def test_a_transient_fault_costs_nothing(number: int) -> None:
    """A run that meets one ends bit for bit as without it, with the same means, and the same last row of each step."""
    one = outcome((6, number, "step"))
    assert one.hits == 1
    assert one.records
    assert is_same(one), one
    if one.one.kind in ("loss", "activation", "gradient"):
        assert not one.different, one


@pytest.mark.parametrize("number", range(0, 12, 2))
def test_a_transient_fault_that_is_read_late(number: int) -> None:
    """In deferred readback, too."""
    one = outcome((6, number, "deferred"))
    assert one.hits == 1
    assert is_same(one), one


def test_a_difference_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that strikes a second time, which no step made again can undo, leaves a difference."""
    monkeypatch.setattr(Strike, "hits", property(lambda self: 0, lambda self, value: None), raising=False)
    one = outcome((5, 0, "step"))
    assert one.one.kind == "loss"
    assert not is_same(one)


def test_a_draw_depends_on_its_numbers_alone() -> None:
    """The same seed and number give the same run, and each kind has its turn."""
    assert draw(3, 7) == draw(3, 7) != draw(4, 7)
    assert {draw(0, number).kind for number in range(len(KINDS))} == set(KINDS)


def test_the_command_names_what_repeats_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table by kind of fault, and figures; a share that was not reached is its status."""
    output = tmp_path / "figures.json"
    assert command.main(["--seed", "5", "--runs", "3", "--output", str(output)]) == 0
    assert "| all | 3 | 3 | 3 |" in capsys.readouterr().out
    assert json.loads(output.read_text())["same"] == 3
    assert command.main(["--seed", "5", "--only", "0", "--wanted", "1.1"]) == 1


@pytest.mark.parametrize(("file", "runs"), [("transient.json", 500), ("transient-deferred.json", 200)])
def test_the_long_campaign(file: str, runs: int) -> None:
    """The figures that the documents name."""
    figures = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    assert figures["struck"] >= runs
    assert figures["same"] >= 0.99 * figures["struck"]
