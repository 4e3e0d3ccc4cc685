"""The benchmark of the guard's cost measures what it says."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from torch.optim import Optimizer

from benchmarks.overhead import __main__ as main
from benchmarks.overhead import report
from benchmarks.overhead.__main__ import _rounded
from benchmarks.overhead.contenders import CONTENDERS
from benchmarks.overhead.models import CPU, CUDA, Workload
from benchmarks.overhead.parts import profile
from benchmarks.overhead.states import measure_states
from benchmarks.overhead.turns import _FIRST, _Turns, take_turns

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = replace(CPU["mlp"], steps=3, rounds=2)
# As what is measured on a CUDA device.
MIXED = replace(TINY, make=CUDA["mlp"].make, precision="bf16-mixed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The benchmark's silence does not outlive a test."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Spy(Callback):
    """Notes at each step what of a contender is there."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, ...]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        callbacks = [one for one in trainer.callbacks if type(one) not in (Spy, _Turns)]  # type: ignore[attr-defined]
        self.seen.append((
            bool(callbacks), trainer.gradient_clip_val is not None, torch.is_anomaly_enabled(),
            bool(optimizer._optimizer_step_pre_hooks), any(bool(m._forward_hooks) for m in pl_module.modules()),
        ))  # fmt: skip


@pytest.mark.parametrize("workload", [TINY, MIXED], ids=["32", "bf16, fused"])
def test_contenders_are_on_and_off_by_turns(workload: Workload, tmp_path: Path) -> None:
    """Every contender has its rounds; in half of the measured steps the trainer is a bare one, in the other half it has
    what is measured; and the tables, the plot and the JSON can be made of them."""
    compared = {}
    for name, contender in CONTENDERS.items():
        # The spy is there in both halves: it is a callback of the Trainer, not of the contender.
        spy = Spy()
        compared[name] = report.compare(take_turns(contender, workload, tmp_path, "cpu", [spy]))
        halves = Counter(spy.seen[_FIRST:])
        assert len(halves) == 2, name
        assert len(set(halves.values())) == 1, name
        assert min(halves, key=sum) == (False, "gradient_clip_val" in contender.options, False, False, False), name
    assert {one["rounds"] for one in compared.values()} == {2}
    with (tmp_path / "table").open("w") as file:
        report.show_race(Console(file=file), "tiny", compared)
    report.plot({"races": {"tiny": compared}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert json.loads(json.dumps(_rounded(compared)))["guard"]["rounds"] == 2


def test_a_contender_that_fails_is_named(tmp_path: Path) -> None:
    """An exception in a contender's run ends the benchmark and says whose it was."""
    broken = replace(CONTENDERS["nothing"], options={"precision": "no such thing"})
    with pytest.raises(RuntimeError, match="a callback that does nothing failed"):
        take_turns(broken, TINY, tmp_path, "cpu")


def test_some_workloads_take_their_places_among_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is written after each workload, so that a later failure loses nothing, and one alone can be
    measured again."""
    output = tmp_path / "overhead.json"
    models = {"one": replace(TINY, title="one"), "two": replace(TINY, title="two")}
    monkeypatch.setattr(main, "CPU", models)
    monkeypatch.setattr(main, "CONTENDERS", {"clip": CONTENDERS["clip"], "step": CONTENDERS["step"]})
    fails = replace(models["two"], precision="no such thing")
    monkeypatch.setitem(models, "two", fails)
    with pytest.raises(RuntimeError, match="failed on two"):
        main.main(["--device", "cpu", "--workloads", "one,two", "--output", str(output)])
    written = json.loads(output.read_text())
    assert list(written["races"]) == ["one"]
    assert list(written["races"]["one"]) == ["clip"], "step is the default on the CPU"
    monkeypatch.setitem(models, "two", replace(TINY, title="two"))
    assert main.main(["--device", "cpu", "--workloads", "two", "--output", str(output)]) == 0
    now = json.loads(output.read_text())
    assert list(now["races"]) == ["one", "two"]
    assert now["races"]["one"] == written["races"]["one"]


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
