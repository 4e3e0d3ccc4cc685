"""Arguments are checked where they are given, and everything can be written in a LightningCLI's YAML file."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
from tests.helpers import batches, fit, task

ROOT = Path(lightning_nanguard.__file__).parent


# ---------------------------------------------------------------------------------------------------- values

# Class, argument, values out of range.
WRONG_VALUES: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (NaNGuard, "snapshot_every_n_steps", [0, -3, 1.5, True, "often"]),
    (NaNGuard, "snapshot_device", ["cuda:9", "disk", ""]),
    (NaNGuard, "max_snapshots", [0, -1]),
    (NaNGuard, "max_snapshot_memory", [0, -0.5]),
    (NaNGuard, "readback", ["never", "Step", ""]),
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
    (DivergingLoss, "factor", [1.0, 0.0, -2.0, math.nan]),
    (DivergingLoss, "patience", [0, 7]),
    (DivergingLoss, "warmup", [0, -1]),
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


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("detectors", "NonFinite", r"NaNGuard\(detectors='NonFinite'\): expected a list of Detector"),
        ("detectors", NonFinite(), r"NaNGuard\(detectors=.*expected a list of Detector"),
        ("detectors", [NonFinite], r"NaNGuard\(detectors=.*not an instance of Detector; write NonFinite\(\)"),
        ("detectors", [Rollback()], r"NaNGuard\(detectors=.*not an instance of Detector"),
        ("remedies", Rollback(), r"NaNGuard\(remedies=.*expected a list of Remedy"),
        ("remedies", [Rollback], r"NaNGuard\(remedies=.*not an instance of Remedy; write Rollback\(\)"),
        ("remedies", [0.5], r"NaNGuard\(remedies=.*0\.5 is not an instance of Remedy"),
        ("budget", 20, r"NaNGuard\(budget=20\): expected a Budget, but got int"),
        ("on_intervention", "print", r"NaNGuard\(on_intervention='print'\): expected a callable"),
    ],
)
def test_wrong_type(argument: str, value: Any, message: str) -> None:
    """A value of the wrong kind is refused at once, with the argument's name and what to write instead."""
    with pytest.raises(TypeError, match=message):
        NaNGuard(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"), [("max_snapshots", "three"), ("max_snapshot_memory", "1GiB"), ("max_snapshots", 2.5)]
)
def test_wrong_type_of_a_number(argument: str, value: Any) -> None:
    """A number that is none is refused by name as well, not by a comparison that fails."""
    with pytest.raises((TypeError, ValueError), match=rf"NaNGuard\({argument}={value!r}\)"):
        NaNGuard(**{argument: value})


def test_two_remedies_for_one_thing() -> None:
    """Two remedies that would carry out the same step are refused."""
    with pytest.raises(ValueError, match="ReduceLR and ReduceLR both carry out Scale"):
        NaNGuard(remedies=[ReduceLR(0.5), ReduceLR(0.1)])


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


def test_nothing_to_train() -> None:
    """A model without a trainable parameter is told so, by its class."""
    from pytorch_lightning import LightningModule

    class Idle(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers"),
        pytest.raises(ValueError, match="Idle has no trainable parameter"),
    ):
        fit(Idle(), batches(), NaNGuard())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- names


def test_public_names() -> None:
    """Every public name is importable from the package itself and listed."""
    for name in lightning_nanguard.__all__:
        assert getattr(lightning_nanguard, name) is not None
        assert name in dir(lightning_nanguard)
    wanted = {
        "NaNGuard",
        "TrainingDivergedError",
        "Intervention",
        "Finding",
        "Fault",
        "Reading",
        "Budget",
        "Detector",
        "NonFinite",
        "GradientSpike",
        "DivergingLoss",
        "Remedy",
        "SkipStep",
        "Rollback",
        "ReduceLR",
        "ClipGradients",
        "ResetMoments",
        "StopTraining",
    }
    assert wanted <= set(lightning_nanguard.__all__)


def test_unknown_name() -> None:
    """A name that is not there is an AttributeError like in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'NanGuard'"):
        _ = lightning_nanguard.NanGuard


@pytest.mark.parametrize("module", ["types", "thresholds", "detect.defaults", "decide.policy", "record.dispatch"])
def test_no_torch(module: str) -> None:
    """The pure parts are importable without torch, Lightning or NumPy being loaded."""
    code = (
        f"import sys, lightning_nanguard.{module}\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning', 'lightning', 'torchmetrics'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def imported_by(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_the_callback_knows_lightning() -> None:
    """No module but ``callback`` and those in ``trainer`` imports Lightning."""
    lightning = {"pytorch_lightning", "lightning", "lightning_fabric"}
    knowing = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if imported_by(path) & lightning}
    assert {name for name in knowing if not name.startswith("trainer/")} <= {"callback.py"}


def test_imports_go_one_way() -> None:
    """The pure parts import nothing of the package but each other."""
    allowed = {
        "types": set(),
        "errors": {"types"},
        "thresholds": {"thresholds"},
        "detect": {"types", "errors", "thresholds", "detect"},
        "decide": {"types", "errors", "thresholds", "decide"},
        "record": {"types", "errors", "thresholds", "record"},
    }
    for name, may in allowed.items():
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else [*(ROOT / name).glob("*.py")]
        used = {
            node.module.split(".")[1]
            for file in files
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_nanguard.")
        }
        assert used <= may, name


# ---------------------------------------------------------------------------------------------------- the command line

SCRIPT = """
import json, sys, torch
from {package}.cli import LightningCLI
from {package} import LightningModule
from torch.utils.data import DataLoader

def note(intervention):
    print("NOTED", intervention.fault)

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

if __name__ == "__main__":
    cli = LightningCLI(Model, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model)
    (guard,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "NaNGuard"]
    print("RESULT", json.dumps({{
        "words": [list(i.remedies) for i in guard.interventions],
        "detectors": [type(d).__name__ for d in guard._detectors],
        "remedies": [type(r).__name__ for r in guard._remedies],
        "factor": guard._remedies[1].factor,
        "clip_val": guard._remedies[2].clip_val,
        "window": guard._budget.window,
        "ratio": guard._detectors[1].ratio,
    }}))
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
        dirpath: records
        on_intervention: train.note
"""
BUDGETS = {
    "by class path": "{class_path: lightning_nanguard.Budget, init_args: {window: 77}}",
    "by its fields": "{window: 77}",
}


def command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT.parent), str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "train.py", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("package", "budget"),
    [
        ("pytorch_lightning", "by class path"),
        pytest.param("pytorch_lightning", "by its fields", marks=pytest.mark.slow),
        ("lightning.pytorch", "by class path"),
    ],
)
def test_command_line(package: str, budget: str, tmp_path: Path) -> None:
    """A YAML file with nested detectors, remedies and a budget makes the guard it describes, under both packages."""
    pytest.importorskip("jsonargparse")
    pytest.importorskip(package.split(".")[0])
    (tmp_path / "train.py").write_text(SCRIPT.format(package=package))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("BUDGET", BUDGETS[budget]))
    done = command(tmp_path, "--config", "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT", 1)[1])
    assert result == {
        "words": [["skip"]],
        "detectors": ["NonFinite", "GradientSpike"],
        "remedies": ["Rollback", "ReduceLR", "ClipGradients", "StopTraining"],
        "factor": 0.25,
        "clip_val": 1.5,
        "window": 77,
        "ratio": 300.0,
    }
    assert "NOTED non_finite_loss" in done.stdout
    assert len((tmp_path / "records" / "interventions.jsonl").read_text().splitlines()) == 1


def test_command_line_refuses(tmp_path: Path) -> None:
    """A value out of its range in a YAML file ends the command with the same message, before training."""
    pytest.importorskip("jsonargparse")
    (tmp_path / "train.py").write_text(SCRIPT.format(package="pytorch_lightning"))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("BUDGET", "null").replace("{factor: 0.25}", "{factor: 1.25}"))
    done = command(tmp_path, "--config", "config.yaml")
    assert done.returncode != 0
    assert "ReduceLR(factor=1.25): expected a number between 0 and 1" in done.stderr
