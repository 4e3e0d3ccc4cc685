"""Why: the cause, the place and the samples of faults of every kind, and that looking for them leaves no trace."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard import Fault, Finding, NaNGuard, TrainingDivergedError
from lightning_nanguard.diagnosis.clues import BadField, Case, Change, Clues, Curvature, Origin, Range
from lightning_nanguard.diagnosis.diagnostician import Diagnostician
from lightning_nanguard.diagnosis.rules import RULES, diagnose
from lightning_nanguard.record.files import read_records
from lightning_nanguard.record.messages import describe
from lightning_nanguard.state.batch_history import BatchHistory, MicroBatch
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.types import Comparison, Evidence
from tests.helpers import (
    Batch,
    FaultAt,
    Task,
    batches,
    copied,
    data_for,
    differences,
    fit,
    learner_of,
    mlp,
    random_state,
    task,
)
from tests.modules import sgd

NAN, INF = math.nan, math.inf
STEPS = 30
AT = 24


class Lossy(Task):
    """A task with a loss of its own; ``loss_of(net, x, y)``."""

    def __init__(
        self,
        loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
        net: nn.Module | None = None,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__(net if net is not None else mlp(), optimizer)
        self.loss_of = loss_of

    def loss(self, batch: Batch, name: str) -> Tensor:
        if isinstance(batch, Mapping):
            batch = (batch["image"], batch["label"])
        loss = self.loss_of(self.net, *batch)
        self.log(name, loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss


def mse(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().mean()


def made(
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = mse,
    spoil: Callable[[Tensor, Tensor], None] = lambda x, y: None,
    *,
    net: Callable[[], nn.Module] = mlp,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    every: bool = False,
    prepare: Callable[[Tensor, Tensor], None] = lambda x, y: None,
    keys: bool = False,
    callbacks: Callable[[], list[Callback]] = list,
    **options: Any,
) -> Callable[[Path], tuple[NaNGuard, Task]]:
    """A run of 30 steps, of which the data of step 24 is spoilt."""

    def run(folder: Path) -> tuple[NaNGuard, Task]:
        torch.manual_seed(0)
        module = Lossy(loss_of, net(), optimizer)
        data: list[Any] = [(x.clone(), y.clone()) for x, y in batches(count=STEPS)]
        for index, (x, y) in enumerate(data):
            prepare(x, y)
            if every or index == AT:
                spoil(x, y)
        if keys:
            data = [{"image": x, "label": y} for x, y in data]
        guard = NaNGuard(snapshot_every_n_steps=5)
        try:
            fit(module, data, guard, folder=folder, callbacks=callbacks(), **options)
        except TrainingDivergedError as error:
            module.error = error  # type: ignore[assignment]
        return guard, module

    return run


def put(
    value: float, *samples: int, column: int | None = None, target: bool = False
) -> Callable[[Tensor, Tensor], None]:
    """Put a value into samples of the input or the target."""

    def spoil(x: Tensor, y: Tensor) -> None:
        for sample in samples:
            rows = y if target else x
            rows[sample, slice(None) if column is None else column] = value

    return spoil


def positive(x: Tensor, y: Tensor) -> None:
    y.abs_().add_(0.1)


class Softmaxed(nn.Module):
    """A log of a softmax written by hand; ``sharpness`` of an input's first column makes it reach zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x), x)


class Head(nn.Module):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        sharp = 1 + 1000 * (x[:, :1] > 50)
        return torch.log(torch.softmax(torch.stack([h[:, 0], 1 + h[:, 0].detach()], 1) * sharp, 1))


class Power(nn.Module):
    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return x**self.exponent


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() / x.exp().sum(1, keepdim=True)


def centre(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = net(x)
    return ((h - h.mean(0)) / x.std(0).mean()).square().mean() + mse(net, x, y)


def masked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(net, x, y) + (net(x) - y)[x[:, 0] < 20].square().mean()


def attended(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    scores = (x @ x.T).masked_fill(torch.eye(len(x)).bool(), -INF).masked_fill(x[:, :1] > 20, -INF)
    return mse(net, x, y) + (scores.softmax(1) @ net(x)).square().mean()


def distance(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - net(x[:, :]).detach() + y).square().sum(1) * (y[:, 0] != 0)).sqrt().mean() + mse(net, x, y)


def safe(function: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> Tensor:
    """What looks safe and is not: the derivative of the branch not taken is infinite."""
    size = net(x).abs() * (x[:, :1] < 50)
    return torch.where(size > 0, function(size), 0.0).mean()


def half_power(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(net, x, y) + ((net(x) * y[:, :1].clamp(max=0.0).add(1).sign()).abs() ** 0.5).mean()


# cause, run, fault's place (part of it), samples
Row = tuple[str, str, Callable[[Path], tuple[NaNGuard, Task]], str, tuple[int, ...]]
RUNS: list[Row] = [
    ("non_finite_input", "two samples", made(mse, put(NAN, 3, 5, column=4)), "field 0", (3, 5)),
    ("non_finite_input", "inf in a target", made(mse, put(INF, 2, target=True)), "field 1", (2,)),
    ("non_finite_input", "by key", made(mse, put(NAN, 7), keys=True), "field image", (7,)),
    ("non_finite_input", "batch norm", made(mse, put(-INF, 0), net=lambda: mlp(norm=True)), "field 0", (0,)),
    ("non_finite_input", "accumulating", made(mse, put(NAN, 1), accumulate_grad_batches=2), "field 0", (1,)),
    ("non_finite_input", "under autocast", made(mse, put(NAN, 1), precision="16-mixed"), "field 0", (1,)),
    ("target_out_of_domain", "log1p", made(lambda net, x, y: mse(net, x, torch.log1p(y)),
     put(-3.0, 4, target=True), prepare=positive), "training_step (log1p, test_diagnosis.py:", (4,)),
    ("target_out_of_domain", "sqrt", made(lambda net, x, y: mse(net, x, y.sqrt()),
     put(-1.0, 1, 6, target=True), prepare=positive), "(sqrt, test_diagnosis.py:", (1, 6)),
    ("target_out_of_domain", "log of zero", made(lambda net, x, y: mse(net, x, y.log()),
     put(0.0, 2, target=True), prepare=positive), "(log, test_diagnosis.py:", (2,)),
    ("target_out_of_domain", "outlier", made(mse, put(1e25, 2, target=True)), "field 1", (2,)),
    ("log_of_zero", "softmax by hand", made(lambda net, x, y: -net(x)[:, 0].mean() + 0 * y.sum(),
     put(100.0, 3, column=0), net=Softmaxed), "head (log, test_diagnosis.py:", (3,)),
    ("log_of_zero", "sigmoid by hand", made(lambda net, x, y: -torch.log(torch.sigmoid(net(x) - 10 * x[:, :1])).mean(),
     put(1000.0, 5, column=0)), "training_step (log, test_diagnosis.py:", (5,)),
    ("log_of_zero", "behind a where", made(lambda net, x, y: mse(net, x, y) + safe(torch.log, net, x),
     put(100.0, 2, column=0)), "training_step (backward of log, test_diagnosis.py:", (2,)),
    ("exp_overflow", "softmax by hand", made(lambda net, x, y: net(x * 100).sum() * 0 + mse(net, x, y)
     + Exponential()(net(x) * 1e-2 + 10 * x[:, :1].relu()).square().mean(), put(100.0, 6, column=0)),
     "exp, test_diagnosis.py:", (6,)),
    ("exp_overflow", "in a module", made(mse, put(200.0, 1, 2), net=lambda: nn.Sequential(
     nn.Identity(), Exponential(), nn.Linear(6, 2))), "net.1 (exp, test_diagnosis.py:", (1, 2)),
    ("exp_overflow", "compiled", made(mse, put(200.0, 1, 2), net=lambda: torch.compile(nn.Sequential(
     nn.Identity(), Exponential(), nn.Linear(6, 2)), backend="eager")), "net.1 (exp, test_diagnosis.py:", (1, 2)),
    ("exp_overflow", "poisson", made(lambda net, x, y: (torch.exp(net(x) + x[:, :1].relu()) - y * net(x)).mean(),
     put(300.0, 0, column=0)), "training_step (exp, test_diagnosis.py:", (0,)),
    ("division_by_zero", "no variance", made(centre, lambda x, y: x.fill_(0.5)), "(div, test_diagnosis.py:", ()),
    ("division_by_zero", "empty mask", made(masked, lambda x, y: x[:, 0].fill_(50.0)), "(mean, test_diagnosis.py:", ()),
    ("division_by_zero", "masked row", made(attended, put(50.0, 3, column=0)), "(softmax, test_diagnosis.py:", (3,)),
    ("division_by_zero", "relative error", made(lambda net, x, y: ((net(x) - y) / y).abs().mean(),
     put(0.0, 4, target=True), prepare=positive), "(div, test_diagnosis.py:", (4,)),
    ("division_by_zero", "every label ignored", made(lambda net, x, y: mse(net, x, y) + F.cross_entropy(
     net(x), torch.where(x[:, 0] > 20, -100, 1)), lambda x, y: x[:, 0].fill_(50.0)), "(nll_loss", ()),
    ("sqrt_at_zero", "behind a where", made(lambda net, x, y: mse(net, x, y) + safe(torch.sqrt, net, x),
     put(100.0, 1, column=0)), "training_step (backward of sqrt, test_diagnosis.py:", (1,)),
    ("sqrt_at_zero", "half power", made(half_power, put(-1.0, 4, target=True, column=0), prepare=positive),
     "backward of pow, test_diagnosis.py:", (4,)),
    ("sqrt_at_zero", "distance", made(distance, put(0.0, 6, target=True)),
     "backward of sqrt, test_diagnosis.py:", (6,)),
    ("low_precision_overflow", "a square", made(mse, put(3000.0, 3), net=lambda: nn.Sequential(
     nn.Linear(6, 8), Power(2), nn.Linear(8, 2)), precision="16-mixed"), "net.1 (pow, test_diagnosis.py:", (3,)),
    ("low_precision_overflow", "a cast", made(mse, put(100.0, 4), net=lambda: nn.Sequential(
     Power(3), nn.Linear(6, 2)), precision="16-mixed"), "net.1 (to_copy, test_diagnosis.py:", (4,)),
    ("low_precision_overflow", "a sum", made(lambda net, x, y: mse(net, x, y) + 1e-6 * (net(x)[:, :1] + 5e4 * x.to(
     net(x).dtype)).sum(1).mean(), put(1.3, 1, 2), prepare=lambda x, y: x.clamp_(-0.1, 0.1), precision="16-mixed"),
     "training_step (", (1, 2)),
    ("corrupted_state", "weight", made(callbacks=lambda: [FaultAt("weight", NAN, AT)]), "parameter net.0.weight", ()),
    ("corrupted_state", "buffer", made(net=lambda: mlp(norm=True), callbacks=lambda: [FaultAt("buffer", NAN, AT)]),
     "buffer net.1.running_var", ()),
    ("corrupted_state", "moment", made(callbacks=lambda: [FaultAt("moment", NAN, AT)]), "net.0.weight", ()),
    ("corrupted_state", "flipped bit", made(callbacks=lambda: [FaultAt("weight", 1e30, AT)], net=lambda: nn.Sequential(
     nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), "net.0.weight", ()),
    ("exploding_gradient", "through time", made(lambda net, x, y: mse(net, x, y) + torch.where(
     x[:, :1] > 20, (net(x) - net(x).detach()) * 1e10, net(x)).mean(), put(25.0, 2, column=0)), "net.", ()),
    ("exploding_gradient", "a steep term", made(lambda net, x, y: mse(net, x, y) + torch.where(
     x[:, :1] > 20, torch.sin(net(x) * 1e9), net(x)).mean(), put(25.0, 2, column=0)), "net.", ()),
    ("exploding_gradient", "in one layer", made(mse, put(25.0, 0, column=0), net=lambda: nn.Sequential(
     nn.Linear(6, 8), Steep(), nn.Linear(8, 2))), "net.0.", ()),
    ("learning_rate_too_high", "sgd", made(optimizer=lambda p: sgd(p, lr=30.0), net=lambda: nn.Sequential(
     nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), "", ()),
    ("learning_rate_too_high", "linear", made(optimizer=lambda p: sgd(p, lr=3.0), net=lambda: nn.Linear(6, 2)), "", ()),
    ("learning_rate_too_high", "adam", made(optimizer=lambda p: optim.Adam(p, lr=30.0)), "", ()),
    ("unnormalised_input", "pixels", made(prepare=lambda x, y: x.abs_().mul_(100), net=lambda: nn.Linear(6, 2),
     optimizer=sgd), "field 0", ()),
    ("unnormalised_input", "a large mean", made(prepare=lambda x, y: x.add_(500), net=lambda: nn.Linear(6, 2),
     optimizer=sgd), "field 0", ()),
    ("unnormalised_input", "an outlier", made(mse, put(1e14, 5), net=lambda: nn.Linear(6, 2)), "field 0", (5,)),
]  # fmt: skip


class Steep(nn.Module):
    """The identity, but for its derivative where the input is large."""

    def forward(self, h: Tensor) -> Tensor:
        steep = (h - h.detach()) * 1e12
        return h + steep * (h.detach().abs().amax() > 5)


def first(guard: NaNGuard) -> Finding | None:
    assert len(guard.interventions), "nothing happened"
    return guard.interventions[0].finding


@pytest.mark.parametrize(
    ("cause", "run", "place", "samples"), [(r[0], *r[2:]) for r in RUNS], ids=[f"{r[0]}-{r[1]}" for r in RUNS]
)
def test_the_cause_is_named(
    cause: str, run: Callable[[Path], tuple[NaNGuard, Task]], place: str, samples: tuple[int, ...], tmp_path: Path
) -> None:
    """The first intervention of a failing run names the cause, the place and, for data, the samples."""
    guard, _ = run(tmp_path)
    finding = first(guard)
    assert finding is not None
    assert finding.cause == cause, finding
    assert place in finding.place
    assert finding.samples == samples
    assert finding.suggestion.endswith((".", ")"))
    assert guard.interventions[0].cause == cause
    record = read_records(tmp_path / "nanguard" / "interventions.jsonl")[0]
    assert record.finding == finding
    assert f"cause: {cause}" in describe(record)


# ---------------------------------------------------------------------------------------------------- other ways to run


@pytest.mark.parametrize("model", ["mlp", "norm", "cnn", "gru", "transformer", "embedding"])
def test_a_healthy_run_has_no_finding(model: str, tmp_path: Path) -> None:
    """Nothing is looked for where nothing happened."""
    guard = NaNGuard()
    fit(task(model), data_for(model, 40), guard, folder=tmp_path)
    assert [found.finding for found in guard.interventions] == []


@pytest.mark.parametrize(("kind", "value"), [("loss", NAN), ("flash", NAN), ("gradient", INF), ("gradient", 1e12)])
@pytest.mark.parametrize("model", ["mlp", "norm", "transformer"])
def test_nothing_is_made_up(model: str, kind: str, value: float, tmp_path: Path) -> None:
    """A fault that neither the batch, nor an operation, nor the weights explain has no finding."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    fit(task(model), data_for(model, STEPS), guard, folder=tmp_path, callbacks=[FaultAt(kind, value, AT)])
    assert len(guard.interventions) == 1
    assert first(guard) is None


@pytest.mark.parametrize("model", ["manual", "norm"])
def test_without_a_replay_the_batch_is_looked_at(model: str, tmp_path: Path) -> None:
    """Under manual optimization and with ``observe=True`` nothing is run again, and bad samples are named."""
    guard = NaNGuard(observe=model == "norm")
    steps = Counted()
    fit(task(model), data_for(model, 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5), steps])
    finding = first(guard)
    assert finding is not None
    assert (finding.cause, finding.samples, finding.place) == ("non_finite_input", (1,), "field 0 of the batch")
    assert steps.forwards == steps.batches * (2 if model == "manual" else 1)


class Counted(Callback):
    """Counts forward passes of the network and batches."""

    def __init__(self) -> None:
        self.forwards = self.batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize("fused", [True, False], ids=["held back", "reached the weights"])
def test_read_late_the_faulty_batch_is_found(fused: bool, tmp_path: Path) -> None:
    """In deferred readback the batch at hand is another one: the faulty one is kept, and its samples are named."""
    guard = NaNGuard(readback="deferred")
    module = task("mlp", lambda parameters: optim.AdamW(parameters, lr=0.01, fused=fused))
    data = data_for("mlp", 12)
    data[5][0][3, 2] = NAN
    fit(module, data, guard, folder=tmp_path)
    assert [(one.cause, one.finding.samples) for one in guard.interventions if one.finding is not None] == [
        ("non_finite_input", (3,))
    ]


@pytest.mark.parametrize("fused", [True, False], ids=["held back", "reached the weights"])
def test_read_late_the_operation_is_found(fused: bool, tmp_path: Path) -> None:
    """A fault that reached the weights is run again from the last good state; they would make anything NaN."""
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    torch.manual_seed(0)
    module = Lossy(
        lambda net, x, y: mse(net, x, y) + (0 * torch.log((x[:, 0] < 50).float())).mean(),
        optimizer=lambda parameters: optim.AdamW(parameters, lr=0.01, fused=fused),
    )
    data = batches(count=12)
    data[5][0][3, 0] = 100.0
    fit(module, data, guard, folder=tmp_path)
    assert [(one.cause, one.finding.samples) for one in guard.interventions if one.finding is not None] == [
        ("log_of_zero", (3,))
    ]


def test_the_error_of_a_lost_run_says_why(tmp_path: Path) -> None:
    """A run that never had a good step is stopped with the cause, its place and what to do."""
    guard = NaNGuard()
    torch.manual_seed(0)
    module = Lossy(lambda net, x, y: mse(net, x, torch.log(y - 100)))
    with pytest.raises(
        TrainingDivergedError, match=r"cause: target_out_of_domain in training_step \(log, .*above 0"
    ) as e:
        fit(module, batches(count=STEPS), guard, folder=tmp_path)
    assert e.value.finding is not None
    assert e.value.finding == guard.interventions[-1].finding
    assert e.value.finding.evidence["operation"] == "log"
    json.dumps(guard.interventions[-1].to_dict(), allow_nan=False)


# ---------------------------------------------------------------------------------------------------- no trace


class Restless(Task):
    """Batch norm, dropout, a metric, and a frozen average and a buffer that every step moves."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        super().__init__(net)
        self.average = nn.Parameter(torch.zeros(8, 6), requires_grad=False)
        self.register_buffer("queue", torch.zeros(300, 100))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        with torch.no_grad():
            self.average.lerp_(self.net[0].weight, 0.1)
            self.queue += 1
        loss = self.loss(batch, "loss")
        return {"loss": loss + 0 * torch.log((batch[0][:, 0] < 50).float()).sum()}


def everything(trainer: Any, module: LightningModule) -> dict[str, Any]:
    """All that a look might leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return copied(
        {
            **learner_of(trainer, module),
            "random": random_state(),
            "gradients": {name: p.grad for name, p in module.named_parameters()},
            "training": [one.training for one in module.modules()],
            "hooks": [len(getattr(one, name)) for one in module.modules() for name in hooks],
            "global hooks": [len(getattr(nn.modules.module, f"_global{name}")) for name in hooks[:2]],
            "anomaly": [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(), torch.is_grad_enabled()],
            "metrics": [dict(trainer.callback_metrics), dict(trainer.logged_metrics)],
            "results": {key: [item.value, item.cumulated_batch_size] for key, item in trainer._results.items()},
            "plugin": sorted(vars(trainer.precision_plugin)),
        }
    )


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "16-mixed"}], ids=["plain", "accumulating", "fp16"]
)
def test_a_replay_leaves_no_trace(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random streams, weights, buffers, metrics, gradients, hooks and logged values are bit for bit as before."""
    left: list[str] = []
    found: list[Finding | None] = []
    original = Diagnostician.diagnose

    def watched(self: Diagnostician, *args: Any) -> Finding | None:
        module = self._learner.module
        before = everything(module.trainer, module)
        found.append(original(self, *args))
        left.extend(differences(before, everything(module.trainer, module)))
        return found[-1]

    monkeypatch.setattr(Diagnostician, "diagnose", watched)
    data = data_for("norm", 20)
    data[12][0][3, 0] = 100.0
    torch.manual_seed(0)
    fit(Restless(), data, NaNGuard(), folder=tmp_path, **options)
    assert [(one.cause, one.samples) for one in found if one is not None] == [("log_of_zero", (3,))]
    assert left == []


def test_a_look_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while the cause is looked for, the run goes on as if nothing had been looked for."""

    def broken(*args: Any, **options: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("lightning_nanguard.diagnosis.diagnostician.replay", broken)
    guard = NaNGuard()
    fit(task("norm"), data_for("norm", 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5)])
    assert [found.cause for found in guard.interventions] == ["non_finite_input"]
    monkeypatch.setattr("lightning_nanguard.diagnosis.diagnostician.look_at", broken)
    fit(task("norm"), data_for("norm", 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5)])
    assert [found.cause for found in guard.interventions] == ["non_finite_input", None]


def test_replays_become_rare() -> None:
    """A fault that keeps coming back is replayed ever more rarely, and its batch is looked at every time."""
    net = nn.Linear(2, 1)
    runs: list[int] = []

    def step(micro: MicroBatch, full_precision: bool) -> Tensor:
        runs.append(micro.index)
        return net(micro.batch).log().sum() * NAN

    tape = BatchHistory(torch.device("cpu"))
    tape.add(1, 0, torch.ones(3, 2))
    doctor = Diagnostician(Learner(net, []), Ring(), step, nullcontext)
    fault = Fault("non_finite_loss", "batch", "loss", NAN)
    seen = []
    for _ in range(20):
        doctor.diagnose(fault, Evidence(step=9), tape.of(1), "replay")
        seen.append(len(runs))
    assert seen == [2, 4, 6, 8, 8, 8, 8, 10, 10, 10, 10, 10, 10, 10, 10, 12, 12, 12, 12, 12]
    tape.add(2, 1, torch.full((3, 2), NAN))
    assert doctor.diagnose(fault, Evidence(step=9), tape.of(2), "replay") is not None


# ---------------------------------------------------------------------------------------------------- rules

LOSS = Fault("non_finite_loss", "batch", "loss", NAN)
GRADIENT = Fault("non_finite_gradient", "batch", "gradient of w", NAN)
SPIKE = Fault("gradient_spike", "batch", "gradient", 1e9)
EXPLODING = Fault("exploding_loss", "learner", "loss", 1e6)
STUCK = Fault("stuck_loss", "learner", "loss", 9.0)
SCALER = Fault("loss_scale_collapse", "learner", "gradient", 0.5)
BACK = Fault("collapsed", "learner", "loss", 2.31)
FAR_OUT = Fault("implausible_state", "state", "buffer bn.running_var", None, "it is over 10000 times what it was")
MOVED = Change("parameter w", 0.1, 1e5, 1e-3)
CORRUPTED = Fault("corrupted_state", "state", "buffer b")
WORSE, SAME = Comparison(INF, 1.0), Comparison(INF, INF)
NEITHER = Comparison(9.0, 1.0, then_finite=False)
NORMAL = Range("0", "float32", -3.0, 3.0, 0.0, 1.0)
PIXELS = Range("0", "float32", 0.0, 255.0, 120.0, 80.0)
FAR = Range("1", "float32", 0.0, 1e20, 1e18, 1e19, outliers=(4,), usual=2.0)
LOG = Origin("log", lowest=0.0, smallest=0.0)
EXP = Origin("exp", highest=100.0)
GROWN = {"growth": 9.0, "first": 2.3, "loss_unit": 2.3}
RISEN, FAR_WORSE = Comparison(0.37, 0.13, then_finite=True), Comparison(30.0, 0.13, then_finite=True)

RULE_ROWS: list[tuple[str | None, Fault, dict[str, Any], Clues]] = [
    (None, LOSS, {}, Clues()),
    (None, LOSS, {}, Clues(inputs=NORMAL)),
    (None, SPIKE, {"usual_norm": 1.0}, Clues(norm=1.5)),
    (None, LOSS, {}, Clues(replayed=True, loss=1.0, gradient_finite=True)),
    ("non_finite_input", LOSS, {"batch_finite": False}, Clues()),
    ("non_finite_input", LOSS, {}, Clues(bad_fields=(BadField("0", (3, 17), (3, 4)),))),
    ("log_of_zero", LOSS, {"batch_finite": False}, Clues(bad_fields=(BadField("0", (3,)),), origin=LOG)),
    ("log_of_zero", LOSS, {}, Clues(origin=Origin("log", lowest=-0.5))),
    ("log_of_zero", GRADIENT, {}, Clues(origin=Origin("log", backward=True), gradient_finite=False)),
    ("target_out_of_domain", LOSS, {}, Clues(origin=Origin("log1p", from_weights=False, from_target=True))),
    ("target_out_of_domain", SPIKE, {}, Clues(target=FAR)),
    ("log_of_zero", LOSS, {}, Clues(origin=Origin("log", from_weights=True, from_target=True))),
    (
        "log_of_zero",
        GRADIENT,
        {"comparison": NEITHER, "climbing": True},
        Clues(origin=Origin("log", backward=True), gradient_finite=False),
    ),
    ("exp_overflow", LOSS, {}, Clues(origin=Origin("exp", highest=100.0))),
    ("exp_overflow", LOSS, {"comparison": SAME}, Clues(origin=Origin("exp", highest=100.0))),
    (
        "learning_rate_too_high",
        LOSS,
        {"comparison": WORSE, "climbing": True},
        Clues(origin=Origin("exp", highest=100.0)),
    ),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("div", smallest=0.0))),
    (None, LOSS, {}, Clues(origin=Origin("div", smallest=0.5))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("pow", smallest=0.0, exponent=-1.0))),
    (None, LOSS, {}, Clues(origin=Origin("pow", smallest=0.0, exponent=2.0))),
    (None, LOSS, {}, Clues(origin=Origin("pow", lowest=-1e30, exponent=2.0, from_weights=False, from_target=True))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("mean", empty=True))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("std"))),
    ("sqrt_at_zero", GRADIENT, {}, Clues(origin=Origin("sqrt", backward=True), gradient_finite=False)),
    ("low_precision_overflow", LOSS, {}, Clues(origin=Origin("exp", dtype="float16"), finite_in_float32=True)),
    ("low_precision_overflow", SCALER, {}, Clues()),
    ("exp_overflow", LOSS, {}, Clues(origin=Origin("exp", dtype="float16"), finite_in_float32=False)),
    ("corrupted_state", CORRUPTED, {"corrupt": "buffer b"}, Clues()),
    ("corrupted_state", LOSS, {"jump": "parameter w", "comparison": WORSE}, Clues(origin=Origin("exp", highest=1e30))),
    ("learning_rate_too_high", LOSS, {"corrupt": "parameter w", "climbing": True}, Clues()),
    (None, LOSS, {"corrupt": "parameter w", "undo": True}, Clues()),
    ("exploding_gradient", SPIKE, {"usual_norm": 1.0}, Clues(norm=1e9, norms=(("a", 1e9), ("b", 1.0)))),
    ("exploding_gradient", GRADIENT, {}, Clues(origin=Origin("mm", backward=True), gradient_finite=False)),
    ("unnormalised_input", EXPLODING, {"comparison": WORSE}, Clues(inputs=PIXELS)),
    ("learning_rate_too_high", EXPLODING, {"comparison": WORSE}, Clues(inputs=PIXELS, normalises=True)),
    ("learning_rate_too_high", STUCK, {"growth": 20.0, "lr": 0.5}, Clues()),
    ("collapsed", BACK, {"first": 2.3, "levels": (0.4, 0.9), "lr": 0.5}, Clues()),
    ("corrupted_state", LOSS, {}, Clues(change=MOVED, good_finite=True, origin=Origin("exp", highest=1e5))),
    ("exp_overflow", LOSS, {}, Clues(change=MOVED, good_finite=False, origin=Origin("exp", highest=1e5))),
    ("corrupted_state", FAR_OUT, {}, Clues()),
    # A good model that an operation does not hold, and a ruined one of which an exponential overflows in the end.
    ("log_of_zero", GRADIENT, {**GROWN, "comparison": RISEN}, Clues(replayed=True, origin=LOG)),
    ("exp_overflow", LOSS, {**GROWN, "comparison": WORSE}, Clues(replayed=True, origin=EXP)),
    ("learning_rate_too_high", LOSS, {**GROWN, "comparison": WORSE, "climbing": True}, Clues(origin=EXP)),
    ("learning_rate_too_high", LOSS, {**GROWN, "comparison": WORSE, "growth": 1e6}, Clues(origin=EXP)),
    ("learning_rate_too_high", GRADIENT, {**GROWN, "comparison": FAR_WORSE}, Clues(replayed=True, origin=LOG)),
    # One that was not looked for again, having been seen so often, is no matter of the rate either.
    (None, GRADIENT, {**GROWN, "comparison": RISEN}, Clues()),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), RULE_ROWS)
def test_rules(cause: str | None, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """The surest cause of what is known."""
    finding = diagnose(Case(fault, Evidence(**{"step": 50, "healthy_steps": 50, "loss_unit": 1.0, **known}), clues))
    assert (None if finding is None else finding.cause) == cause


def test_the_curvature_says_which_rate_is_allowed() -> None:
    """With gᵀg and gᵀHg the suggestion names the rate above which the loss stops falling, and half of it as best."""
    curvature = Curvature(slope=3.1, bend=200.0)
    finding = diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, lr=0.5), curvature=curvature))
    assert finding is not None
    assert finding.cause == "learning_rate_too_high"
    assert "along the gradient the loss of this batch stops falling above 0.031" in finding.suggestion
    assert "below 0.031; 0.015 lowers this batch's loss most" in finding.suggestion
    assert finding.evidence["largest_rate"] == pytest.approx(0.031)


@pytest.mark.parametrize(
    ("steepest", "typical", "cause"),
    [
        (3000.0, 0.1, "ill_conditioned"),
        (3000.0, 100.0, "learning_rate_too_high"),
        (1000.0, 0.1, "learning_rate_too_high"),
    ],
)
def test_a_low_rate_that_diverges_is_ill_conditioned(steepest: float, typical: float, cause: str) -> None:
    """Where λ·ε > 2 in one direction and the others hardly bend, it is the conditioning more than the rate."""
    curvature = Curvature(1.0, steepest, steepest=steepest, typical=typical)
    finding = diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, lr=0.001), curvature=curvature))
    assert finding is not None
    assert finding.cause == cause


def test_suggestions_have_numbers() -> None:
    """What to do comes with the numbers it rests on."""
    said = {
        "non_finite_input": "samples 3 and 17 of this batch hold NaN or Inf in field 0, columns 3 and 4",
        "learning_rate_too_high": "learning rate 0.5; the loss of this batch is inf, under the last good weights 1",
        "exploding_gradient": "the gradient norm is 1e+09, usually 1.5; that of a is 1e+03 times that of b",
    }
    findings = [
        diagnose(Case(LOSS, Evidence(step=9), Clues(bad_fields=(BadField("0", (3, 17), (3, 4)),)))),
        diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, lr=0.5), Clues())),
        diagnose(Case(SPIKE, Evidence(step=9, usual_norm=1.5), Clues(norm=1e9, norms=(("a", 1e9), ("b", 1e6))))),
    ]
    for finding in findings:
        assert finding is not None
        assert said.pop(finding.cause) in finding.suggestion
    assert said == {}


def test_each_rule_names_its_own_cause() -> None:
    """A rule is called as the cause it finds, and every one has a row above or a table in a test of its own."""
    elsewhere = (".model", ".course")
    names = {rule.__name__ for rule in RULES if not rule.__module__.endswith(elsewhere)}
    assert {row[0] for row in RULE_ROWS} - {None} == names - {"ill_conditioned"}


def test_rules_need_no_torch() -> None:
    """The rules are numbers and words: importing them imports neither torch nor Lightning."""
    code = (
        "import sys, lightning_nanguard.diagnosis.rules\n"
        "assert not {'torch', 'numpy', 'pytorch_lightning', 'lightning'} & {*sys.modules}, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)
