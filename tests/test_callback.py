"""Arguments are checked where they are given, and everything can be written in a LightningCLI's YAML file."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, LightningModule

import lightning_nanguard
from lightning_nanguard import (
    Budget,
    ClipGradients,
    DivergingLoss,
    GradientSpike,
    NaNGuard,
    NonFinite,
    ReduceLR,
    Rollback,
    SkipStep,
    StopTraining,
)
from tests.helpers import FaultAt, batches, data_for, fit, task

ROOT = Path(lightning_nanguard.__file__).parent


# ---------------------------------------------------------------------------------------------------- values

# Class, argument, values out of range.
WRONG_VALUES: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (Budget, "max_rollbacks", [0, -1, 1.5]),
    (Budget, "max_rollbacks_per_place", [0, -1, 2.5]),
    (Budget, "max_bad_batches", [0, -1]),
    (Budget, "max_skip_share", [0.0, -0.1, 1.1]),
    (Budget, "window", [0, -1]),
    (NonFinite, "overflow_patience", [0, -1]),
    (NonFinite, "min_loss_scale", [0.0, -1.0]),
    (GradientSpike, "threshold", [0.0, -1.0, math.nan]),
    (GradientSpike, "ratio", [1.0, 0.5, math.nan]),
    (GradientSpike, "window", [5]),
    (GradientSpike, "warmup", [0, 3]),
    (DivergingLoss, "patience", [0, 7]),
    (ReduceLR, "factor", [0.0, 1.0, 2.0, -0.5, math.nan]),
    (ReduceLR, "min_lr", [-1e-3, math.inf, math.nan]),
    (ReduceLR, "recover_after", [0, -5]),
    (ClipGradients, "clip_val", [0, -1.0, math.inf, math.nan, "often", True]),
    (ClipGradients, "algorithm", ["l1", ""]),
    (ClipGradients, "recover_after", [0, -5]),
]


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        pytest.param(kind, argument, value, id=f"{kind.__name__}-{argument}-{value!r}")
        for kind, argument, values in WRONG_VALUES
        for value in values
    ],
)
def test_wrong_value(kind: Callable[..., Any], argument: str, value: Any) -> None:
    """A value out of its range is refused at once, by a message that names class, argument and value."""
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({argument}=.*expected") as error:
        kind(**{argument: value})
    assert repr(value) in str(error.value)


def test_contradiction_of_value_clipping_and_auto() -> None:
    """An automatic clipping value is a norm, and asking for it by value says so."""
    with pytest.raises(ValueError, match=r"ClipGradients\(algorithm='value'\).*auto"):
        ClipGradients("auto", algorithm="value")


def test_contradiction_of_window_and_warmup() -> None:
    """A window shorter than its own warm-up is refused with both numbers."""
    with pytest.raises(ValueError, match=r"GradientSpike\(window=30\): expected an integer of at least warmup=40"):
        GradientSpike(window=30, warmup=40)


@pytest.mark.parametrize("remedies", [[], [StopTraining()], [SkipStep()], [Rollback()]])
def test_short_lists_are_taken(remedies: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every short list of remedies makes a guard that trains."""
    monkeypatch.chdir(tmp_path)
    guard = NaNGuard(remedies=remedies)
    assert fit(task(), batches(), guard).trainer.global_step == 12
    assert list(guard.interventions) == []


def test_too_little_memory() -> None:
    """A limit that not even two snapshots fit in is refused with what is needed."""
    with pytest.raises(ValueError, match=r"NaNGuard\(max_snapshot_memory=1e-09\): one snapshot takes about .* GiB"):
        fit(task(), batches(), NaNGuard(max_snapshot_memory=1e-9))


def test_callable_is_told_before_the_next_step(tmp_path: Path) -> None:
    """``on_intervention`` and the file have a record before the next batch begins."""
    told: list[tuple[int, int]] = []
    lines: list[int] = []
    path = tmp_path / "records" / "interventions.jsonl"

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
            lines.append(len(path.read_text().splitlines()) if path.exists() else 0)

    guard = NaNGuard(
        [NonFinite()], dirpath=path.parent, on_intervention=lambda i: told.append((i.batch_idx, len(lines)))
    )
    faults = [FaultAt("input", math.nan, [3, 9])]
    fit(task(), data_for("mlp", 12), guard, folder=tmp_path, callbacks=[*faults, Looks()])
    assert told == [(3, 4), (9, 10)]
    assert lines == [0] * 4 + [1] * 6 + [2] * 2


def test_nothing_to_train() -> None:
    """A model without a trainable parameter is left alone."""
    from pytorch_lightning import LightningModule

    class Idle(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    guard = NaNGuard()
    with pytest.warns(UserWarning, match=r"configure_optimizers|returned `None`"):
        fit(Idle(), batches(), guard)  # type: ignore[arg-type]
    assert list(guard.interventions) == []


# ---------------------------------------------------------------------------------------------------- the command line

SCRIPT = """
import json, sys, torch
from {package}.cli import LightningCLI
from {package} import LightningModule
from torch.utils.data import DataLoader

from lightning_nanguard import Sink

def note(intervention):
    print("NOTED", intervention.fault)

class Beep(Sink):
    def __init__(self, word: str = "BEEP"):
        self.word = word
    def write(self, intervention):
        print(self.word, intervention.fault)

class Called:
    def __call__(self, intervention):
        print("CALLED", intervention.fault)

class Model(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr, self.net = lr, torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def train_dataloader(self):
        data = [torch.randn(4, 3) for _ in range(10)]
        data[5][0] = float("nan")
        return DataLoader(data, batch_size=None)
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)

def main():
    cli = LightningCLI(Model, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model)
    (guard,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "NaNGuard"]
    print("RESULT", json.dumps({{
        "words": [list(i.remedies) for i in guard.interventions],
        "detectors": [type(d).__name__ for d in guard._arguments.detectors],
        "remedies": [type(r).__name__ for r in guard._arguments.remedies],
        "factor": guard._arguments.remedies[1].factor,
        "clip_val": guard._arguments.remedies[2].clip_val,
        "window": guard._arguments.budget.window,
        "ratio": guard._arguments.detectors[1].ratio,
        "act_on": guard._arguments.act_on,
    }}))

if __name__ == "__main__":
    main()
"""

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_nanguard.NaNGuard
      init_args:
        detectors:
          - class_path: lightning_nanguard.NonFinite
            init_args: {overflow_patience: 7}
          - class_path: lightning_nanguard.GradientSpike
            init_args: {ratio: 300.0}
        remedies:
          - class_path: lightning_nanguard.Rollback
          - class_path: lightning_nanguard.ReduceLR
            init_args: {factor: 0.25}
          - class_path: lightning_nanguard.ClipGradients
            init_args: {clip_val: 1.5}
          - class_path: lightning_nanguard.StopTraining
        budget: BUDGET
        snapshot_every_n_steps: 5
        max_snapshot_memory: 0.5
        readback: step
        act_on: evidence
        dirpath: records
        on_intervention: train.note
        sinks:
          - class_path: train.Beep
            init_args: {word: BOOP}
          - train.Beep
          - train.note
          - class_path: train.Called
"""
BUDGETS = {
    "by class path": "{class_path: lightning_nanguard.Budget, init_args: {window: 77}}",
    "by its fields": "{window: 77}",
}


EXPECTED = {
    "words": [["skip"]],
    "detectors": ["NonFinite", "GradientSpike"],
    "remedies": ["Rollback", "ReduceLR", "ClipGradients", "StopTraining"],
    "factor": 0.25,
    "clip_val": 1.5,
    "window": 77,
    "ratio": 300.0,
    "act_on": "evidence",
}


def put_down(folder: Path, package: str, config: str) -> None:
    """The script and its configuration, in a folder of their own."""
    pytest.importorskip("jsonargparse")
    pytest.importorskip(package.split(".")[0])
    (folder / "train.py").write_text(SCRIPT.format(package=package))
    (folder / "config.yaml").write_text(config)


def assert_guarded(output: str, folder: Path) -> None:
    assert json.loads(output.split("RESULT", 1)[1]) == EXPECTED
    told = [line for line in output.splitlines() if line.endswith(" non_finite_loss")]
    assert told == [f"{word} non_finite_loss" for word in ("NOTED", "BOOP", "BEEP", "NOTED", "CALLED")]
    assert len((folder / "records" / "interventions.jsonl").read_text().splitlines()) == 1


def test_command_line(tmp_path: Path) -> None:
    """A YAML file with nested detectors, remedies, a budget and sinks of every kind makes the guard it describes."""
    put_down(tmp_path, "pytorch_lightning", CONFIG.replace("BUDGET", BUDGETS["by class path"]))
    path = os.pathsep.join(filter(None, [str(ROOT.parent), str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_guarded(done.stdout, tmp_path)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Runs the script with a package and a configuration, within this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])

    def run(package: str, config: str) -> None:
        put_down(tmp_path, package, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("train").main()

    yield run
    sys.modules.pop("train", None)


@pytest.mark.parametrize(
    ("package", "budget"), [("lightning.pytorch", "by class path"), ("pytorch_lightning", "by its fields")]
)
def test_command_line_of_either_package(
    package: str,
    budget: str,
    script: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same file does under both packages, and a budget may be written by its fields."""
    script(package, CONFIG.replace("BUDGET", BUDGETS[budget]))
    assert_guarded(capsys.readouterr().out, tmp_path)


def test_command_line_refuses(script: Callable[[str, str], None]) -> None:
    """A value out of its range in a YAML file ends the command with the same message, before training."""
    with pytest.raises(ValueError, match=r"ReduceLR\(factor=1\.25\): expected a number between 0 and 1"):
        script("pytorch_lightning", CONFIG.replace("BUDGET", "null").replace("{factor: 0.25}", "{factor: 1.25}"))


def test_command_line_refuses_an_unknown_trust(
    script: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """So does a word for ``act_on`` that is none, with the choices."""
    with pytest.raises(SystemExit):
        script("pytorch_lightning", CONFIG.replace("BUDGET", "null").replace("act_on: evidence", "act_on: proof"))
    told = capsys.readouterr().err
    assert "act_on" in told
    assert "certain" in told
    assert "evidence" in told
