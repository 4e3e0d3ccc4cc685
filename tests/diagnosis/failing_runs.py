"""Runs of thirty steps that fail, one cause each: what goes wrong, and what should be said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard import Detector, DivergingLoss, NaNGuard, NonFinite, TrainingDivergedError
from lightning_nanguard.types import ActOn
from tests.helpers import Batch, FaultAt, Task, batches, fit, mlp
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
    act_on: ActOn = "certain",
    steps: int = STEPS,
    detectors: Callable[[], list[Detector] | None] = lambda: None,
    **options: Any,
) -> Callable[[Path], tuple[NaNGuard, Task]]:
    """A run of 30 steps, of which the data of step 24 is spoilt."""

    def run(folder: Path) -> tuple[NaNGuard, Task]:
        torch.manual_seed(0)
        module = Lossy(loss_of, net(), optimizer)
        data: list[Any] = [(x.clone(), y.clone()) for x, y in batches(count=steps)]
        for index, (x, y) in enumerate(data):
            prepare(x, y)
            if every or index == AT:
                spoil(x, y)
        if keys:
            data = [{"image": x, "label": y} for x, y in data]
        guard = NaNGuard(detectors(), snapshot_every_n_steps=5, act_on=act_on)
        try:
            fit(module, data, guard, folder=folder, callbacks=callbacks(), **options)
        except TrainingDivergedError as error:
            module.error = error  # type: ignore[assignment]
        return guard, module

    return run


# Of a run whose numbers stay finite.
evident = partial(made, act_on="evidence")
# A trial is made as early as there are batches for one.
tried = partial(evident, detectors=lambda: [NonFinite(), DivergingLoss(patience=14)], steps=180)


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


FailingRun = Callable[[Path], tuple[NaNGuard, Task]]

# cause, name, run, the fault's place (part of it), samples
RUNS: list[tuple[str, str, FailingRun, str, tuple[int, ...]]] = [
    ("non_finite_input", "two samples", made(mse, put(NAN, 3, 5, column=4)), "field 0", (3, 5)),
    ("non_finite_input", "inf in a target", made(mse, put(INF, 2, target=True)), "field 1", (2,)),
    ("non_finite_input", "by key", made(mse, put(NAN, 7), keys=True), "field image", (7,)),
    ("non_finite_input", "batch norm", made(mse, put(-INF, 0), net=lambda: mlp(norm=True)), "field 0", (0,)),
    ("non_finite_input", "accumulating", made(mse, put(NAN, 1), accumulate_grad_batches=2), "field 0", (1,)),
    ("non_finite_input", "under autocast", made(mse, put(NAN, 1), precision="16-mixed"), "field 0", (1,)),
    ("target_out_of_domain", "log1p", made(lambda net, x, y: mse(net, x, torch.log1p(y)),
     put(-3.0, 4, target=True), prepare=positive), "training_step (log1p, failing_runs.py:", (4,)),
    ("target_out_of_domain", "sqrt", made(lambda net, x, y: mse(net, x, y.sqrt()),
     put(-1.0, 1, 6, target=True), prepare=positive), "(sqrt, failing_runs.py:", (1, 6)),
    ("target_out_of_domain", "log of zero", made(lambda net, x, y: mse(net, x, y.log()),
     put(0.0, 2, target=True), prepare=positive), "(log, failing_runs.py:", (2,)),
    ("target_out_of_domain", "outlier", made(mse, put(1e25, 2, target=True)), "field 1", (2,)),
    ("log_of_zero", "softmax by hand", made(lambda net, x, y: -net(x)[:, 0].mean() + 0 * y.sum(),
     put(100.0, 3, column=0), net=Softmaxed), "head (log, failing_runs.py:", (3,)),
    ("log_of_zero", "sigmoid by hand", made(lambda net, x, y: -torch.log(torch.sigmoid(net(x) - 10 * x[:, :1])).mean(),
     put(1000.0, 5, column=0)), "training_step (log, failing_runs.py:", (5,)),
    ("log_of_zero", "behind a where", made(lambda net, x, y: mse(net, x, y) + safe(torch.log, net, x),
     put(100.0, 2, column=0)), "training_step (backward of log, failing_runs.py:", (2,)),
    ("exp_overflow", "softmax by hand", made(lambda net, x, y: net(x * 100).sum() * 0 + mse(net, x, y)
     + Exponential()(net(x) * 1e-2 + 10 * x[:, :1].relu()).square().mean(), put(100.0, 6, column=0)),
     "exp, failing_runs.py:", (6,)),
    ("exp_overflow", "in a module", made(mse, put(200.0, 1, 2), net=lambda: nn.Sequential(
     nn.Identity(), Exponential(), nn.Linear(6, 2))), "net.1 (exp, failing_runs.py:", (1, 2)),
    ("exp_overflow", "compiled", made(mse, put(200.0, 1, 2), net=lambda: torch.compile(nn.Sequential(
     nn.Identity(), Exponential(), nn.Linear(6, 2)), backend="eager")), "net.1 (exp, failing_runs.py:", (1, 2)),
    ("exp_overflow", "poisson", made(lambda net, x, y: (torch.exp(net(x) + x[:, :1].relu()) - y * net(x)).mean(),
     put(300.0, 0, column=0)), "training_step (exp, failing_runs.py:", (0,)),
    ("division_by_zero", "no variance", made(centre, lambda x, y: x.fill_(0.5)), "(div, failing_runs.py:", ()),
    ("division_by_zero", "empty mask", made(masked, lambda x, y: x[:, 0].fill_(50.0)), "(mean, failing_runs.py:", ()),
    ("division_by_zero", "masked row", made(attended, put(50.0, 3, column=0)), "(softmax, failing_runs.py:", (3,)),
    ("division_by_zero", "relative error", made(lambda net, x, y: ((net(x) - y) / y).abs().mean(),
     put(0.0, 4, target=True), prepare=positive), "(div, failing_runs.py:", (4,)),
    ("no_valid_target", "every label ignored", made(lambda net, x, y: mse(net, x, y) + F.cross_entropy(
     net(x), torch.where(x[:, 0] > 20, -100, 1)), lambda x, y: x[:, 0].fill_(50.0)), "(nll_loss", ()),
    ("sqrt_at_zero", "behind a where", made(lambda net, x, y: mse(net, x, y) + safe(torch.sqrt, net, x),
     put(100.0, 1, column=0)), "training_step (backward of sqrt, failing_runs.py:", (1,)),
    ("sqrt_at_zero", "half power", made(half_power, put(-1.0, 4, target=True, column=0), prepare=positive),
     "backward of pow, failing_runs.py:", (4,)),
    ("sqrt_at_zero", "distance", made(distance, put(0.0, 6, target=True)),
     "backward of sqrt, failing_runs.py:", (6,)),
    ("low_precision_overflow", "a square", made(mse, put(3000.0, 3), net=lambda: nn.Sequential(
     nn.Linear(6, 8), Power(2), nn.Linear(8, 2)), precision="16-mixed"), "net.1 (pow, failing_runs.py:", (3,)),
    ("low_precision_overflow", "a cast", made(mse, put(100.0, 4), net=lambda: nn.Sequential(
     Power(3), nn.Linear(6, 2)), precision="16-mixed"), "net.1 (to_copy, failing_runs.py:", (4,)),
    ("low_precision_overflow", "a sum", made(lambda net, x, y: mse(net, x, y) + 1e-6 * (net(x)[:, :1] + 5e4 * x.to(
     net(x).dtype)).sum(1).mean(), put(1.3, 1, 2), prepare=lambda x, y: x.clamp_(-0.1, 0.1), precision="16-mixed"),
     "training_step (", (1, 2)),
    ("corrupted_state", "weight", made(callbacks=lambda: [FaultAt("weight", NAN, AT)]), "parameter net.0.weight", ()),
    ("corrupted_state", "buffer", made(net=lambda: mlp(norm=True), callbacks=lambda: [FaultAt("buffer", NAN, AT)]),
     "buffer net.1.running_var", ()),
    ("corrupted_state", "moment", made(callbacks=lambda: [FaultAt("moment", NAN, AT)]), "net.0.weight", ()),
    ("corrupted_state", "flipped bit", made(callbacks=lambda: [FaultAt("weight", 1e30, AT)], net=lambda: nn.Sequential(
     nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), "net.0.weight", ()),
    ("exploding_gradient", "through time", evident(lambda net, x, y: mse(net, x, y) + torch.where(
     x[:, :1] > 20, (net(x) - net(x).detach()) * 1e10, net(x)).mean(), put(25.0, 2, column=0)), "net.", ()),
    ("exploding_gradient", "a steep term", evident(lambda net, x, y: mse(net, x, y) + torch.where(
     x[:, :1] > 20, torch.sin(net(x) * 1e9), net(x)).mean(), put(25.0, 2, column=0)), "net.", ()),
    ("exploding_gradient", "in one layer", evident(mse, put(25.0, 0, column=0), net=lambda: nn.Sequential(
     nn.Linear(6, 8), Steep(), nn.Linear(8, 2))), "net.0.", ()),
    ("learning_rate_too_high", "sgd", made(optimizer=lambda p: sgd(p, lr=30.0), net=lambda: nn.Sequential(
     nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), "", ()),
    ("learning_rate_too_high", "linear", tried(
     optimizer=lambda p: sgd(p, lr=3.0), net=lambda: nn.Linear(6, 2)), "", ()),
    ("learning_rate_too_high", "adam", tried(optimizer=lambda p: optim.Adam(p, lr=30.0)), "", ()),
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
