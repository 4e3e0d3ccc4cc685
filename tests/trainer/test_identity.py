"""Law 1: a healthy run is the same bit for bit with and without the guard."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn, optim
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Counting,
    Lookahead,
    Run,
    Task,
    data_for,
    differences,
    fit,
    mlp,
    samples,
    state_of,
    task,
    with_nan,
)

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd fused": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.01)),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.05, fused=True),
    "sparse adam": lambda p: optim.SparseAdam(p, lr=0.01),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.5, max_iter=4, history_size=5),
    "counting": lambda p: Counting(p, lr=0.05),
    "lookahead": lambda p: Lookahead(p, lr=0.05, momentum=0.9),
    "two groups": lambda p: optim.AdamW([{"params": p[:1], "lr": 0.02}, {"params": p[1:]}], lr=0.005),
}


SCHEDULERS: dict[str, Callable[[Optimizer], Any] | None] = {
    "": None,
    "onecycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=60),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=10),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=5),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.95),
}


@dataclass(frozen=True)
class Case:
    """One healthy run."""

    model: str = "mlp"
    optimizer: str = "adamw"
    scheduler: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    readback: str = "step"
    shuffle: bool = False

    def __str__(self) -> str:
        told = [f"{key}={value}" for key, value in self.options.items()]
        parts = [self.model, self.optimizer, self.scheduler, *told, self.readback, "shuffle" if self.shuffle else ""]
        return "/".join(part for part in parts if part and part != "step")


def case(text: str, **options: Any) -> Case:
    model, optimizer, *rest = text.split("/")
    scheduler = next((part for part in rest if part in SCHEDULERS), "")
    readback = "deferred" if "deferred" in rest else "step"
    return Case(model, optimizer, scheduler, options, readback, "shuffle" in rest)


# Every model, optimizer, precision, scheduler and option at least twice, in changing company.
CASES = [
    case("mlp/sgd"),
    case("mlp/sgd/deferred/shuffle"),
    case("mlp/momentum/onecycle"),
    case("mlp/sgd fused/cosine/deferred"),
    case("mlp/adam/restarts", accumulate_grad_batches=3),
    case("mlp/amsgrad/plateau/shuffle", gradient_clip_val=0.5),
    case("mlp/adamw fused/onecycle/deferred", gradient_clip_val=0.5),
    case("mlp/adamw fused/deferred", precision="bf16-mixed", accumulate_grad_batches=2),
    case("mlp/adamw fused/deferred", precision="16-mixed"),
    case("mlp/adamw fused", precision="16-mixed"),
    case("mlp/adamw foreach/exponential", precision="64-true"),
    case("mlp/adamw tensor/cosine"),
    case("mlp/rmsprop/restarts/deferred"),
    case("mlp/adagrad", precision="16-mixed", accumulate_grad_batches=3),
    case("mlp/adagrad fused/cosine/deferred/shuffle"),
    case("mlp/lbfgs"),
    case("mlp/lbfgs/exponential/deferred", precision="64-true"),
    case("mlp/lbfgs/restarts", gradient_clip_val=1.0),
    case("norm/lbfgs"),
    case("mlp/counting/shuffle"),
    case("mlp/counting/deferred", accumulate_grad_batches=2),
    case("mlp/lookahead"),
    case("mlp/lookahead/deferred"),
    case("mlp/two groups/exponential", gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    case("norm/adam/plateau", accumulate_grad_batches=5),
    case("norm/momentum/deferred", precision="bf16-mixed"),
    case("cnn/adamw/onecycle/shuffle"),
    case("cnn/momentum/cosine", precision="bf16-mixed"),
    case("cnn/adam/deferred", precision="16-mixed", gradient_clip_val=0.5),
    case("cnn/adamw fused/deferred", accumulate_grad_batches=2),
    case("cnn/sgd/plateau", precision="64-true"),
    case("gru/adam/cosine", gradient_clip_val=0.2),
    case("gru/rmsprop/deferred/shuffle"),
    case("gru/adamw foreach", precision="64-true", accumulate_grad_batches=3),
    case("transformer/adamw/onecycle/shuffle", gradient_clip_val=1.0),
    case("transformer/adamw fused/restarts/deferred"),
    case("transformer/adam", precision="bf16-mixed", accumulate_grad_batches=2),
    case("transformer/sgd/deferred", precision="16-mixed"),
    case("transformer/adagrad/plateau", precision="64-true"),
    case("embedding/adam/shuffle"),
    case("embedding/adamw fused/deferred", gradient_clip_val=0.5),
    case("sparse/sgd"),
    case("sparse/sgd/cosine/deferred"),
    case("sparse alone/sparse adam/shuffle"),
    case("sparse alone/sparse adam/exponential/deferred", accumulate_grad_batches=2),
    case("manual/adam"),
    case("manual/momentum/deferred/shuffle", precision="bf16-mixed"),
    case("manual/adamw fused/deferred", precision="64-true"),
    case("manual/adamw foreach", precision="16-mixed"),
]


def run(chosen: Case, guard: NaNGuard | None, folder: Path, **more: Any) -> Run:
    metric = chosen.model not in ("manual", "gru")
    module = task(chosen.model, OPTIMIZERS[chosen.optimizer], SCHEDULERS[chosen.scheduler], metric)
    data = data_for(chosen.model)
    loader = DataLoader(samples(data), batch_size=8, shuffle=True) if chosen.shuffle else data
    val = data_for(chosen.model, 2, seed=9)
    return fit(module, loader, guard, folder=folder, val=val, max_epochs=2, **{**chosen.options, **more})


def saved(finished: Run, path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without what is the guard's own."""
    finished.trainer.save_checkpoint(path)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    content["callbacks"] = {key: value for key, value in content["callbacks"].items() if "NaNGuard" not in key}
    return content


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_healthy_run_is_the_same(chosen: Case, tmp_path: Path) -> None:
    """Weights, buffers, optimizer state, schedulers, scaler, random streams, every logged value and the checkpoint are
    those of the run without the guard."""
    bare = run(chosen, None, tmp_path)
    guard = NaNGuard(snapshot_every_n_steps=3, readback=chosen.readback)
    guarded = run(chosen, guard, tmp_path)

    assert list(guard.interventions) == []
    assert guard.lr_multiplier == 1.0
    assert bare.logger.rows, "nothing was logged, so nothing was compared"
    assert differences(state_of(bare), state_of(guarded)) == []
    assert differences(saved(bare, tmp_path / "bare.ckpt"), saved(guarded, tmp_path / "guarded.ckpt")) == []
    assert not list(tmp_path.rglob("interventions.jsonl"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"snapshot_every_n_steps": 1, "max_snapshots": 1},
        {"snapshot_every_n_steps": 2, "snapshot_device": "cpu"},
        {"snapshot_every_n_steps": 2, "max_snapshot_memory": 0.1},
        {"observe": True, "snapshot_every_n_steps": 2},
        {"detectors": [], "remedies": []},
    ],
    ids=str,
)
def test_no_argument_changes_a_healthy_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    """However snapshots are taken, a healthy run stays the same."""
    chosen = case("cnn/adam/cosine/shuffle")
    guard = NaNGuard(**arguments)
    assert differences(state_of(run(chosen, None, tmp_path)), state_of(run(chosen, guard, tmp_path))) == []
    assert list(guard.interventions) == []


def test_csv_log_is_the_same(tmp_path: Path) -> None:
    """What a CSVLogger writes is the same, learning rates included, but for the guard's own curves beside it."""
    written = []
    for name in ("bare", "guarded"):
        guard = NaNGuard(snapshot_every_n_steps=3) if name == "guarded" else None
        logger = CSVLogger(tmp_path / name, name="log", version=0)
        monitor = LearningRateMonitor("step")
        run(case("norm/adam/onecycle"), guard, tmp_path, logger=logger, callbacks=[monitor])
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            read = [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]
        rows = [{key: text for key, text in row.items() if not key.startswith("nanguard/")} for row in read]
        written.append([row for row in rows if row.keys() - {"step"}])
        assert any("nanguard/grad_norm" in row for row in read) == (guard is not None)
    assert len(written[0]) > 24
    assert written[0] == written[1]


def test_checkpoints_written_on_the_way_are_the_same(tmp_path: Path) -> None:
    """ModelCheckpoint saves the same files at the same steps, and EarlyStopping decides the same."""
    contents = []
    for name in ("bare", "guarded"):
        guard = NaNGuard(snapshot_every_n_steps=3) if name == "guarded" else None
        keep = ModelCheckpoint(
            tmp_path / name, filename="{step}", monitor="loss_step", save_top_k=-1, every_n_train_steps=4
        )
        options = {"callbacks": [keep, EarlyStopping("val_loss", patience=1)], "enable_checkpointing": True}
        run(case("cnn/adamw/plateau"), guard, tmp_path, **options)
        files = sorted((tmp_path / name).glob("*.ckpt"))
        loaded = {file.name: torch.load(file, weights_only=True) for file in files}
        for content in loaded.values():
            content["callbacks"] = {k: v for k, v in content["callbacks"].items() if k.startswith("EarlyStopping")}
        contents.append(loaded)
    assert len(contents[0]) == 6
    assert differences(*contents) == []


class DrawsEverywhere(Task):
    """Draws from every random stream, counts its calls in a buffer, and logs."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(mlp(norm=True), nn.Dropout(0.3)), optim.AdamW)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.log("drawn", random.random() + np.random.rand(), on_step=True, on_epoch=True)
        return self.loss(batch, "loss")


class Freezes(Callback):
    """Freezes a layer in mid-run and gives it back."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pl_module.net[0].requires_grad_(not 4 <= batch_idx < 8)


def test_parameters_without_gradients(tmp_path: Path) -> None:
    """Parameters that are unused, frozen and given back are left alone."""
    ended = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=2)):
        module = task("mlp")
        module.unused = nn.Linear(3, 3)
        module.net[2].bias.requires_grad_(False)
        data = data_for("mlp")
        ended.append(state_of(fit(module, data, guard, folder=tmp_path, max_epochs=2, callbacks=[Freezes()])))
    assert differences(*ended) == []


class Moody(Task):
    """Gives a loss, a dictionary, or nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch, "loss")
        return (loss, {"loss": loss, "more": loss.detach()}, None)[batch_idx % 3]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("window", [1, 2])
def test_step_that_returns_a_dictionary_or_nothing(window: int, tmp_path: Path) -> None:
    """What ``training_step`` gives back makes no difference, a skipped batch of the user's own included."""
    ended = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=2)):
        torch.manual_seed(0)
        done = fit(Moody(mlp()), data_for("mlp", 18), guard, folder=tmp_path, accumulate_grad_batches=window)
        ended.append(state_of(done))
        if guard is not None:
            assert list(guard.interventions) == []
    assert differences(*ended) == []


def test_second_fit_starts_as_it_would_without(tmp_path: Path) -> None:
    """The same guard and module may be fitted twice; nothing of the guard stays behind in between."""
    ended = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=2)):
        module = task("norm", OPTIMIZERS["momentum"], SCHEDULERS["onecycle"])
        fit(module, data_for("norm"), guard, folder=tmp_path)
        ended.append(state_of(fit(module, data_for("norm"), guard, folder=tmp_path)))
    assert differences(*ended) == []


def test_the_comparison_sees_a_single_bit(tmp_path: Path) -> None:
    """A guard that changed something would be found: one number drawn, one bit, one sign, one NaN."""
    assert differences(torch.tensor([0.0]), torch.tensor([-0.0])) != []
    assert differences({"a": [torch.tensor(float("nan"))]}, {"a": [torch.tensor(float("nan"))]}) == []
    chosen = case("cnn/adam/shuffle")

    class Draws(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                torch.rand(())

    found = differences(
        state_of(run(chosen, None, tmp_path)), state_of(run(chosen, None, tmp_path, callbacks=[Draws()]))
    )
    assert any("/random/torch" in where for where in found)
    assert with_nan(data_for("mlp")[0])[0].isnan().any()
