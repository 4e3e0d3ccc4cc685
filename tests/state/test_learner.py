"""The learner: what of a run is restored, by state keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.finite import FiniteCheck
from lightning_nanguard.state.learner import Learner, describe
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import capture
from tests.helpers import batches, differences, fit, state_of, task, words
from tests.state.nets import Net, made, train


def test_names_are_the_users() -> None:
    """State keys are told in words a user knows from the module."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    described = {describe(key) for key, _ in learner.leaves()}
    assert {"parameter first.weight", "buffer norm.running_var", "optimizer state exp_avg_sq of first.weight"} <= (
        described
    )
    assert describe(("group", 0, 1, "k")) == "k in group 1 of optimizer 0"
    assert describe(("average", "EMA", "w")) == "w in the averaged copy of EMA"
    net, optimizer, learner = made("wrapping")
    train(net, optimizer, 1, seed=1)
    described = {describe(key) for key, _ in learner.leaves()}
    assert {
        "optimizer state before of first.bias",
        "optimizer state exp_avg of first.bias in base_optimizer",
    } <= described
    assert describe(("something", 3, "else")) == "something 3 else"


def test_the_clock_is_not_the_learner() -> None:
    """What schedulers write into groups is left out, what an optimizer keeps there is not."""
    _, optimizer, learner = made("sgd")
    optimizer.param_groups[0]["counted"] = 3
    keys = {key[3] for key, _ in learner.optimizer_leaves(0) if key[0] == "group"}
    assert "counted" in keys
    assert keys.isdisjoint({"params", "lr", "momentum", "weight_decay"})


def test_a_tied_parameter_has_one_name() -> None:
    """Of two names for one parameter the first counts, in its weights as in its optimizer state."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    assert learner.parameter_names()[id(net.tied.weight)] == "first.weight"
    named = [key for key, _ in learner.leaves() if any("tied" in str(part) for part in key)]
    assert named == []


def test_statistics_are_those_of_normalisation_and_averages() -> None:
    """Running statistics, and averaged copies of these and of parameters, count as statistics; other buffers do not."""
    net = Net()
    average: dict[str, Tensor] = {"module.last.weight": net.last.weight.detach().clone(), "n": torch.zeros(())}
    average["module.norm.running_mean"] = torch.zeros(8)
    learner = Learner(net, [], averages=lambda: {"EMA": average})
    assert learner.statistics(dict(learner.leaves())) == [
        ("buffer", "norm.running_mean"),
        ("buffer", "norm.running_var"),
        ("average", "EMA", "module.last.weight"),
        ("average", "EMA", "module.norm.running_mean"),
    ]


def test_what_an_optimizer_steps() -> None:
    """Each optimizer has its own parameters and gradients; one that evaluates several times a step is known."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(net[0].parameters(), 0.1), torch.optim.LBFGS(net[1].parameters())]
    learner = Learner(net, optimizers)
    net[0](torch.ones(1, 2)).sum().backward()
    assert [key for key, _ in learner.weights_of(1)] == [("parameter", "1.weight"), ("parameter", "1.bias")]
    assert [name for name, _ in learner.named_gradients(0)] == ["0.weight", "0.bias"]
    assert learner.gradients(1) == []
    assert learner.quasi_newton == {1}


def test_lazy_parameters_join_when_they_are_made() -> None:
    """A parameter that the first forward makes is no leaf before it."""
    net = nn.LazyLinear(2)
    learner = Learner(net, [])
    assert learner.lazy()
    assert list(learner.weights()) == []
    net(torch.full((1, 3), math.pi))
    assert not learner.lazy()
    assert [key for key, _ in learner.weights()] == [("parameter", "weight"), ("parameter", "bias")]


def test_what_is_held_changes_with_any_leaf() -> None:
    """The same objects are held as long as no leaf is another one; the clock's values are not among them."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = optim.Adam(net.parameters())
    learner = Learner(net, [optimizer], averages=lambda: {"ema": averaged})
    averaged = {"0.weight": torch.zeros(2, 2)}

    def changed(before: list[object]) -> bool:
        now = learner.held()
        return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))

    before = learner.held()
    optimizer.param_groups[0]["lr"] = 0.5
    assert not changed(before)
    for change in (
        lambda: net(torch.randn(3, 2)).sum().backward() or optimizer.step(),
        lambda: net[1].register_buffer("running_mean", torch.ones(2)),
        lambda: optimizer.param_groups[0].update(eps=0.5),
        lambda: averaged.update({"0.weight": torch.ones(2, 2)}),
        lambda: net.append(nn.Linear(2, 2)),
    ):
        before = learner.held()
        change()
        assert changed(before)
    assert learner.held()[: len(learner.held_weights())] == learner.held_weights()


def test_parameters_that_no_optimizer_trains() -> None:
    """A frozen copy is a part of its own, whether or not the optimizer holds it. What is frozen for one step, has a
    gradient, or may be the original of a copy that is stepped instead, is trained."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
            self.ema = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).requires_grad_(False)})
            self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    net = Net()
    frozen = {("parameter", name) for name, one in net.named_parameters() if not one.requires_grad}
    for held in (net.parameters(), net.body.parameters()):
        optimizer = optim.Adam(held)
        learner = Learner(net, [optimizer])
        net.body[1].requires_grad_(False)
        assert learner.untrained().keys() == frozen
        assert set(learner.untrained().values()) == {("untrained", "ema"), ("untrained", "scale")}
        net.body[1].requires_grad_(True)
    untrained = learner.untrained()
    copies = learner.copies("ema", untrained)
    assert copies[("parameter", "ema.inner.0.weight")] == ("parameter", "body.0.weight")
    assert len(copies) == 4
    assert learner.copies("scale", untrained) == {}
    assert learner.copies("other", {**untrained, ("parameter", "body.1.bias"): ("untrained", "other")}) == {}

    head = Learner(net, [optim.SGD(net.body[1].parameters(), lr=0.1)])
    assert ("parameter", "body.0.weight") in head.untrained()
    net.body[0].weight.grad = torch.zeros(3, 2)
    assert ("parameter", "body.0.weight") not in head.untrained()
    masters = Learner(net, [optim.SGD([one.detach().clone() for one in net.body.parameters()], lr=0.1)])
    assert masters.untrained().keys() == frozen


class Own(Optimizer):
    """SGD with momentum in a dictionary, a counter, a mean, a list of tensors, and a best loss that begins at Inf."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.momentum: dict[Tensor, Tensor] = {}
        self.best, self.steps, self.parameters = torch.tensor(math.inf), 0, self.param_groups[0]["params"]
        self._mean, self.last = torch.zeros(()), [torch.zeros(1)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        self.steps += 1
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is None:
                    continue
                moment = self.momentum.setdefault(parameter, torch.zeros_like(parameter))
                moment.mul_(0.9).add_(parameter.grad)
                parameter.sub_(moment, alpha=0.05)
                self._mean.add_(parameter.grad.mean())
                self.last = [parameter.grad.clone()]
        return loss


def test_they_are_restored_in_place() -> None:
    """As they were at the snapshot; moments that began later are gone, other names of the weights are no copies."""
    module = nn.Linear(2, 1)
    optimizer = Own(module.parameters())
    learner = Learner(module, [optimizer])
    begin = capture(learner, step=0, global_step=0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    later = capture(learner, step=1, global_step=1)
    own = {key[2:] for key in later.leaves if key[0] == "own"}
    names = {("momentum", "weight"), ("momentum", "bias"), ("best",), ("steps",), ("_mean",), ("last",)}
    assert own == names
    moment = optimizer.momentum[module.weight]
    optimizer.step()
    restore(learner, later)
    assert optimizer.momentum[module.weight] is moment
    assert moment.tolist() == [[1.0, 1.0]]
    assert (optimizer.steps, optimizer.last[0].tolist(), float(optimizer._mean)) == (1, [1.0], 2.0)
    assert FiniteCheck().corrupt(learner.leaves()) is None
    restore(learner, begin)
    assert (optimizer.momentum, optimizer.steps) == ({}, 0)
    restore(learner, later)
    assert optimizer.momentum[module.weight].tolist() == [[1.0, 1.0]], "a trial goes to the start and comes back"


def test_a_weight_that_goes_bad_by_itself_costs_nothing(tmp_path: Path) -> None:
    """The updates since the snapshot can be made again bit for bit, for the moments went back with the weights."""
    runs = []
    for guard, at in ((None, -1), (NaNGuard(), 20)):
        module = task(optimizer=Own)

        def start(batch: Any, batch_idx: int, module: Any = module, at: int = at) -> None:
            if batch_idx == at:
                next(module.parameters()).data.fill_(math.nan)

        module.on_train_batch_start = start
        runs.append(fit(module, batches(count=24), guard, folder=tmp_path))
        if guard is not None:
            assert words(guard) == [("restore", "redo")]
    assert differences(state_of(runs[1]), state_of(runs[0])) == []
    assert runs[0].trainer.optimizers[0].steps == runs[1].trainer.optimizers[0].steps
