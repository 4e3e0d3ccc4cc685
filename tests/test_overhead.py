"""The benchmark of the guard's cost measures what it says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.overhead import report
from benchmarks.overhead.__main__ import _groups, _rounded
from benchmarks.overhead.contenders import CONTENDERS
from benchmarks.overhead.models import CPU
from benchmarks.overhead.parts import profile
from benchmarks.overhead.states import measure_states
from benchmarks.overhead.turns import race
from lightning_nanguard import keeper, ring

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = replace(CPU["mlp"], steps=3, rounds=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The benchmark's own clock and silence do not outlive a test."""
    clocks = ring.time, keeper.time
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    ring.time, keeper.time = clocks


def test_contenders_take_turns(tmp_path: Path) -> None:
    """Every contender has its rounds, and the tables, the plot and the JSON can be made of them."""
    racers = race(CONTENDERS, TINY, tmp_path, "cpu")
    assert {name: len(racer.times) for name, racer in racers.items()} == dict.fromkeys(CONTENDERS, 2)
    assert not any(racer.alive for racer in racers.values())
    compared = report.compare(racers)
    assert compared["bare"]["ratio"] == 1.0
    with (tmp_path / "table").open("w") as file:
        report.show_race(Console(file=file), "tiny", compared)
    report.plot({"races": {"tiny": compared}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(json.dumps(_rounded(compared)))["guard"]["rounds"] == 2


def test_a_contender_that_fails_is_named(tmp_path: Path) -> None:
    """An exception in a contender's thread ends the benchmark and says whose it was."""
    broken = replace(CONTENDERS["nothing"], options={"precision": "no such thing"})
    with pytest.raises(RuntimeError, match="a callback that does nothing failed"):
        race({"broken": broken}, TINY, tmp_path, "cpu")


def test_groups_hold_the_bare_one() -> None:
    """However few fit into memory at once, each is measured beside what it is compared with."""
    for at_once in (1, 2, 5, 100):
        groups = list(_groups(CONTENDERS, {"bare", "clip"}, at_once))
        assert set().union(*groups) == set(CONTENDERS)
        assert all("bare" in group for group in groups)
        assert all(CONTENDERS[name].against in group for group in groups for name in group)


def test_parts_and_states_are_measured(tmp_path: Path) -> None:
    """The guard's parts lie within its hooks, and a rollback, a snapshot and a checkpoint file are timed."""
    found = profile(TINY, tmp_path, "cpu", 40)
    assert 0 < found["bound"] < found["guard"] < found["step"]
    assert found["parts"]["    their norms"] < found["parts"]["measure and judge"]
    late = {"  take snapshots", "  look at them before they are certified"}  # may not fall due in so few updates
    assert [name for name, spent in found["parts"].items() if not spent and name not in late] == []
    states = measure_states(TINY, tmp_path, "cpu", readback="step")
    assert states["delay_steps"] == 0
    assert states["rollback_ms"] > 0
    assert states["snapshot_bytes"] > 3 * 4 * 9_000
