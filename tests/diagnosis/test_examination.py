"""A loss that does not move is examined: advice with a cause, no trace, and silence where all is well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard import Advice, Layer, Model, NaNGuard
from lightning_nanguard.diagnosis.examination import _with_updates
from lightning_nanguard.record.files import read_file
from tests.helpers import Batch, Task, batches, copied, data_for, differences, fit, folder_of, state_of, task

STEPS = 110


class Stuck(Task):
    """A task of its own loss; ``loss_of(net, x, y)``."""

    def __init__(
        self,
        net: nn.Module,
        loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
        make: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:
        super().__init__(net, make)
        self.loss_of = loss_of

    def loss(self, batch: Batch, name: str) -> Tensor:
        loss = self.loss_of(self.net, *batch)
        self.log(name, loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss


def squared(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x), y)


def sgd(rate: float) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda parameters: optim.SGD(parameters, rate)


def deep() -> Stuck:
    layers = [part for _ in range(10) for part in (nn.Linear(6, 6), nn.Dropout(0.2), nn.Sigmoid())]
    return Stuck(nn.Sequential(*layers, nn.Linear(6, 2)), squared, sgd(0.01))


def zero() -> Stuck:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return Stuck(net, squared, sgd(0.05))


class Point(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.w


def jumping() -> Stuck:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ((1 + 100 * net(x).square()).sqrt()).mean() + 1e-3 * x.mean()

    return Stuck(Point(torch.tensor([1.0, -1.0, 1.0])), loss, sgd(0.6))


def well() -> Stuck:
    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        w = net(x)
        return ((w.square() - 1).square() + 0.2 * w).mean() + 1 + 1e-3 * (w * x[:, :4].mean(0)).mean()

    return Stuck(Point(torch.full((4,), 0.9)), loss, sgd(0.05))


RUNS = [
    ("vanishing_gradient", deep, "net.0"),
    ("saddle_point", zero, "loss"),
    ("oscillation", jumping, "loss"),
    ("local_minimum", well, "loss"),
]


@pytest.mark.parametrize(("cause", "make", "place"), RUNS, ids=[row[0] for row in RUNS])
def test_a_loss_that_does_not_move_is_examined(
    cause: str, make: Callable[[], Stuck], place: str, tmp_path: Path
) -> None:
    """The surest advice names the cause and is on record; nothing is done about it."""
    torch.manual_seed(0)
    guard = NaNGuard(examine_after=64, detectors=[])
    fit(make(), batches(count=STEPS), guard, folder=tmp_path)
    assert guard.advice
    surest = guard.advice[0]
    assert (surest.occasion, surest.finding.cause, surest.finding.place) == ("loss does not move", cause, place)
    assert any(character.isdigit() for character in surest.finding.suggestion)
    assert [one.finding.cause for one in read_file(folder_of(guard) / "advice.jsonl", Advice.from_dict)] == [
        one.finding.cause for one in guard.advice
    ]
    assert len(guard.interventions) == 0


@pytest.mark.parametrize("make", [deep, zero, jumping], ids=["deep", "zero", "jumping"])
def test_an_examination_leaves_no_trace(make: Callable[[], Stuck], tmp_path: Path) -> None:
    """Weights, moments, random streams, gradients and logged values are bit for bit those of a run without a guard."""

    def run(guard: NaNGuard | None) -> dict[str, Any]:
        torch.manual_seed(0)
        return copied(state_of(fit(make(), batches(count=STEPS), guard, folder=tmp_path)))

    bare = run(None)
    guard = NaNGuard(examine_after=64, detectors=[])
    assert differences(bare, run(guard)) == []
    assert guard.advice


@pytest.mark.parametrize("model", ["mlp", "norm", "cnn", "gru", "transformer", "embedding"])
def test_a_healthy_run_is_not_advised(model: str, tmp_path: Path) -> None:
    """A loss that falls, or has settled low, is left alone; also when somebody asks."""
    guard = NaNGuard(examine_after=16, act_on="evidence")
    ask = Ask(guard, 70)
    fit(task(model), data_for(model, 80), guard, folder=tmp_path, callbacks=[ask])
    assert ask.asked
    assert [advice.finding for advice in guard.advice] == []
    assert not list(tmp_path.rglob("advice.jsonl"))


class Ask(Callback):
    """Asks for an examination at a step."""

    def __init__(self, guard: NaNGuard, at: int) -> None:
        self.guard, self.at, self.asked = guard, at, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.guard.examine()
            self.asked = True


def test_one_may_ask(tmp_path: Path) -> None:
    """Without a patience the run is examined when somebody asks, at the end of that batch."""
    torch.manual_seed(0)
    guard = NaNGuard(detectors=[])
    fit(zero(), batches(count=40), guard, folder=tmp_path, callbacks=[Ask(guard, 35)])
    assert [(one.global_step, one.occasion, one.finding.cause) for one in guard.advice] == [
        (36, "asked", "saddle_point")
    ]


def test_asking_outside_of_a_fit_is_an_error() -> None:
    """There is nothing to examine before the fit."""
    with pytest.raises(RuntimeError, match="call it during a fit"):
        NaNGuard().examine()


@pytest.mark.parametrize("value", [0, 15, -1, 2.5, True, "100"])
def test_a_wrong_patience_is_refused(value: Any) -> None:
    """A patience is an integer long enough to see a loss move."""
    with pytest.raises(ValueError, match=r"NaNGuard\(examine_after="):
        NaNGuard(examine_after=value)


def test_without_scipy_it_is_said_once(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """Saddle points and minima need the extra, and the warning names it; the rest is examined all the same."""
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    torch.manual_seed(0)
    guard = NaNGuard(examine_after=16, detectors=[])
    fit(deep(), batches(count=STEPS), guard, folder=tmp_path)
    assert guard.advice[0].finding.cause == "vanishing_gradient"
    assert caplog.text.count("lightning-nanguard[curvature]") == 1


def test_a_weight_that_no_product_shows_is_a_layer_too() -> None:
    """Where a model multiplies with a multiple of a weight, what an update makes of it is known all the same."""
    model = Model((Layer("head", "Linear"),))
    found = _with_updates(model, (Layer("head", "", update=0.1), Layer("body", "", weight=2.0, update=0.5)))
    assert [(one.path, one.update) for one in found.layers] == [("head", 0.1), ("body", 0.5)]
