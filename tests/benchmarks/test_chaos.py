"""Faults of every kind: a short campaign; `make chaos` has the long one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.chaos import __main__ as command
from benchmarks.chaos import running
from benchmarks.chaos.draws import COMPANIONS, KINDS, MODELS, MOMENTS, NUMBERS, draw
from benchmarks.chaos.running import outcome
from lightning_nanguard.guard import remedy_actions
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.trainer.repeat import updates_again

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")

SEED, DRAWS = 40, 42


@pytest.mark.parametrize("first", range(0, DRAWS, len(KINDS)))
def test_what_the_guard_promises_holds(first: int) -> None:
    """Whatever strikes: all is finite in the end and in every file, a skip is the run without the batch, a step made
    again is the run without the fault, a restore is its snapshot, what was done is on record, and nothing is left.
    """
    found = [outcome((SEED, number)) for number in range(first, first + len(KINDS))]
    assert {one.number: one.wrong for one in found if one.wrong} == {}
    assert any(one.acted for one in found)


LOST = replace(
    draw(SEED, 5),
    kind="weight", value="NaN", moment="any", at=20, mode="automatic", precision="32-true",
    optimizer="adam",
    schedule="constant", readback="step", act_on="certain", average="none", companions=(), accumulate=1,
    every=4,
)  # fmt: skip


def test_what_does_not_hold_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A state that is not the one promised, and a module kept alive, are told with the line that repeats the draw."""
    kept = []

    def spoilt(learner: Learner, snapshot: Snapshot, *args: Any, **options: Any) -> Any:
        kept.append(learner)
        restore(learner, snapshot, *args, **options)
        with torch.no_grad():
            next(learner.module.parameters()).add_(1.0)

    for module in (updates_again, remedy_actions):
        monkeypatch.setattr(module, "restore", spoilt)
    monkeypatch.setattr(running, "draw", lambda seed, number: LOST)
    assert command.main(["--seed", "9", "--only", "70"]) == 1
    said = capsys.readouterr().out
    assert "python -m benchmarks.chaos --seed 9 --only 70" in said
    assert "the guard keeps" in said
    assert "does not end as" in said or "the state is not that of step" in said


def test_a_draw_depends_on_its_numbers_alone() -> None:
    """The same seed and number give the same run, and everything there is has its turn."""
    assert draw(3, 7) == draw(3, 7) != draw(4, 7)
    drawn = [draw(1, number) for number in range(800)]
    assert {one.kind for one in drawn} == set(KINDS)
    assert {one.value for one in drawn} >= set(NUMBERS)
    assert {one.task for one in drawn} == set(MODELS)
    assert {name for one in drawn for name in one.companions} == set(COMPANIONS)
    assert {one.moment for one in drawn} == set(MOMENTS)


def test_the_command_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table by contender, one by fault, and figures; where there is no time for a draw none is made."""
    output = tmp_path / "figures.json"
    assert command.main(["--seed", str(SEED), "--runs", "3", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "| no guard |" in said
    assert "| all | 3 | 0 |" in said
    assert json.loads(output.read_text())["runs"] == 3
    assert command.main(["--minutes", "0"]) == 0
    assert "| all | 0 | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--jobs", "2", "--minutes", "1"])
