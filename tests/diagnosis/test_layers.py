"""What one pass over a model shows, layer by layer, and the causes that are read from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nanguard import Finding
from lightning_nanguard.diagnosis.batch import batch_clues
from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.layers import measure_layers
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.helpers import differences, mlp

Init = Callable[[nn.Linear], object]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

LOW = 0.5
CLASSES = 10


def net(
    *sizes: int, act: type[nn.Module] = nn.ReLU, init: Init | None = None, last: nn.Module | None = None
) -> nn.Module:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise((20, *sizes, CLASSES))):
        linear = nn.Linear(a, b)
        if init is not None:
            init(linear)
        layers += [linear] if index == len(sizes) else [linear, act()]
    return nn.Sequential(*layers, *([last] if last is not None else []))


def std(value: float) -> Init:
    return lambda linear: nn.init.normal_(linear.weight, std=value)


def bias(value: float) -> Init:
    return lambda linear: nn.init.constant_(linear.bias, value)


def zero_last(linear: nn.Linear) -> None:
    nn.init.kaiming_normal_(linear.weight)
    if linear.out_features == CLASSES:
        nn.init.zeros_(linear.weight)


class Functional(nn.Module):
    """Sigmoids called as a function, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(12))
        self.out = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.out(x)


class ByHand(nn.Module):
    """Weights of its own, multiplied by hand."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(20, 40) / 20**0.5)
        self.second = nn.Parameter(torch.randn(40, CLASSES) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.first) @ self.second


class Convolutions(nn.Module):
    """Images of 20 numbers, whose channels are dead or not."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        nn.init.constant_(self.conv.bias, shift)
        self.head = nn.Linear(16 * 2 * 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x.reshape(-1, 1, 4, 5))).flatten(1))


def ce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def bce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(model(x)[:, 0].sigmoid(), binary(y))


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).float()


def binary(y: Tensor) -> Tensor:
    return (y > 4).float()


# name, cause, model, loss, scale of the inputs, place
Row = tuple[str, str, Callable[[], nn.Module], Loss, float, str]
FAILING: list[Row] = [
    ("sigmoids", "vanishing_gradient", lambda: net(*[30] * 8, act=nn.Sigmoid), ce, 1, "0"),
    ("in a loop", "vanishing_gradient", Functional, ce, 1, "layers.0"),
    ("tiny weights", "vanishing_gradient", lambda: net(*[30] * 8, act=nn.Tanh, init=std(0.01)), ce, 1, "0"),
    ("pixels", "unnormalised_input", lambda: net(64), ce, 100, "field 0"),
    ("pixels, sigmoid", "unnormalised_input", lambda: net(30, act=nn.Sigmoid), ce, 100, "field 0"),
    ("pixels, tanh", "unnormalised_input", lambda: net(30, 30, act=nn.Tanh), ce, 200, "field 0"),
    ("shifted sigmoids", "saturated_activation", lambda: net(30, 30, act=nn.Sigmoid, init=bias(9)), ce, 1,
     "1 (Sigmoid)"),
    ("shifted tanh", "saturated_activation", lambda: net(30, act=nn.Tanh, init=bias(-5)), ce, 1, "1 (Tanh)"),
    ("large scale", "saturated_activation", lambda: nn.Sequential(
        nn.Linear(20, 30), Times(30), nn.Sigmoid(), nn.Linear(30, 10)), ce, 1, "2 (Sigmoid)"),
    ("biases", "dead_relu", lambda: net(30, 30, init=bias(-10)), ce, 1, "1 (ReLU)"),
    ("one layer", "dead_relu", lambda: nn.Sequential(net(30, last=nn.ReLU()), Plus(-9), nn.ReLU()), ce, 1, "2 (ReLU)"),
    ("channels", "dead_relu", lambda: Convolutions(-9), ce, 1, "training_step (relu, test_layers.py:"),
    ("all of N(0, 1)", "unbalanced_initialisation", lambda: net(64, 64, init=std(1)), ce, 1, ""),
    ("one layer", "unbalanced_initialisation", lambda: nn.Sequential(
        net(64, last=nn.ReLU()), wide(nn.Linear(CLASSES, CLASSES), 20)), ce, 1, "1"),
    ("by hand", "unbalanced_initialisation", lambda: ByHand(5), ce, 1, "second"),
    ("no chance level", "unbalanced_initialisation", lambda: net(64, 64, init=std(1)),
     lambda model, x, y: (model(x) - x[:, :10]).abs().mean(), 1, ""),
    ("module", "double_softmax", lambda: net(64, last=nn.Softmax(1)), ce, 1, "3 (softmax, test_layers.py:"),
    ("function", "double_softmax", lambda: net(64), lambda model, x, y: F.cross_entropy(F.softmax(model(x), -1), y),
     1, "training_step (softmax, test_layers.py:"),
    ("reshaped", "double_softmax", lambda: net(64), lambda model, x, y: F.cross_entropy(
        F.softmax(model(x), 1).view(-1, 5, CLASSES).transpose(1, 2).double(), y.view(-1, 5)), 1,
     "training_step (softmax"),
    ("sigmoid", "double_softmax", lambda: net(64, last=nn.Sigmoid()), lambda model, x, y:
     F.binary_cross_entropy_with_logits(model(x)[:, 0], binary(y)), 1, "3 (sigmoid, test_layers.py:"),
    ("mse_loss", "mse_for_classification", lambda: net(64, act=nn.Sigmoid, last=nn.Sigmoid()), lambda model, x, y:
     F.mse_loss(model(x), one_hot(y)), 1, "training_step (mse_loss, test_layers.py:"),
    ("by hand", "mse_for_classification", lambda: net(64, last=nn.Softmax(1)), lambda model, x, y:
     ((one_hot(y) - model(x)) ** 2).sum(1).mean(), 1, "training_step (squared error, test_layers.py:"),
    ("times itself", "mse_for_classification", lambda: net(64), lambda model, x, y: times_itself(
        model(x) - one_hot(y)), 1, "training_step (squared error, test_layers.py:"),
    ("two classes", "mse_for_classification", lambda: net(64), lambda model, x, y:
     F.mse_loss(model(x)[:, 0].sigmoid(), binary(y)), 1, "training_step (mse_loss"),
    ("too few outputs", "target_out_of_domain", lambda: net(64), lambda model, x, y:
     F.cross_entropy(model(x)[:, :7], y), 1, "training_step (cross_entropy, test_layers.py:"),
]  # fmt: skip

HEALTHY: list[tuple[str, Callable[[], nn.Module], Loss]] = [
    ("relu", lambda: net(64, 64), ce),
    ("deep relu", lambda: net(*[30] * 6), ce),
    ("deep tanh", lambda: net(*[30] * 6, act=nn.Tanh), ce),
    ("three sigmoids", lambda: net(30, 30, 30, act=nn.Sigmoid), ce),
    ("last layer of zeros", lambda: net(*[30] * 6, init=zero_last), ce),
    ("log_softmax", lambda: net(64, last=nn.LogSoftmax(1)), lambda model, x, y: F.nll_loss(model(x), y)),
    ("softmax inside", lambda: nn.Sequential(nn.Linear(20, 8), nn.Softmax(1), nn.Linear(8, 10)), ce),
    ("label smoothing", lambda: net(64), lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=0.1)),
    (
        "sigmoid with bce",
        lambda: net(64),
        lambda model, x, y: F.binary_cross_entropy(model(x)[:, 0].sigmoid(), binary(y)),
    ),
    ("regression", lambda: net(64), lambda model, x, y: F.mse_loss(model(x)[:, 0], y.float() / 5 - 1)),
    ("squares", lambda: net(64), lambda model, x, y: (model(x)[:, 0] - y / 10).square().mean()),
    ("reconstruction", lambda: net(64), lambda model, x, y: F.mse_loss(model(x), x[:, :10])),
    ("no loss at all", lambda: net(64, 64), lambda model, x, y: 0 * ce(model, x, y)),
    ("channels", lambda: Convolutions(0), ce),
    ("by hand", lambda: ByHand(0.1), ce),
]


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Plus(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def wide(linear: nn.Linear, value: float) -> nn.Linear:
    nn.init.normal_(linear.weight, std=value)
    return linear


def times_itself(difference: Tensor) -> Tensor:
    return (difference * difference).mean()


def found(model: nn.Module, loss: Loss, scale: float = 1.0, seed: int = 0) -> tuple[Finding, ...]:
    x, y = torch.randn(40, 20), torch.randint(0, CLASSES, (40,))
    x = x if scale == 1 else x.abs() * scale
    seen = measure_layers(model, (x, y), lambda: loss(model, x, y), nullcontext)
    return RuleSet().findings(Case(model=seen, clues=batch_clues((x, y), model)))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "cause", "model", "loss", "scale", "place"), FAILING, ids=[f"{row[1]}-{row[0]}" for row in FAILING]
)
def test_the_cause_is_read_from_the_layers(
    name: str, cause: str, model: Callable[[], nn.Module], loss: Loss, scale: float, place: str, seed: int
) -> None:
    """The surest finding names the cause and its place, above low confidence, with numbers in the suggestion."""
    torch.manual_seed(seed)
    first = found(model(), loss, scale)[0]
    assert first.cause == cause, first
    assert place in first.place
    assert first.confidence > LOW
    assert any(letter.isdigit() for letter in first.suggestion)
    assert first.suggestion.endswith(".")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "model", "loss"), HEALTHY, ids=[row[0] for row in HEALTHY])
def test_a_healthy_model_has_no_finding(name: str, model: Callable[[], nn.Module], loss: Loss, seed: int) -> None:
    """Nothing above low confidence on models that learn."""
    torch.manual_seed(seed)
    assert [finding for finding in found(model(), loss) if finding.confidence > LOW] == []


def test_layers_are_told_in_the_order_they_run() -> None:
    """Weights and activations in order, with their scales and gradients."""
    model = mlp(norm=True)
    x = torch.randn(16, 6)
    seen = measure_layers(model, x, lambda: model(x).square().mean(), nullcontext)
    assert seen is not None
    assert [(one.path, one.kind) for one in seen.layers] == [("0", "Linear"), ("2", "Tanh"), ("3", "Linear")]
    first = seen.layers[0]
    assert first.inputs == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert first.outputs == pytest.approx(float(model[0](x).detach().square().mean().sqrt()), rel=1e-5)
    (gradient,) = torch.autograd.grad(model(x).square().mean(), [model[3].weight])
    assert seen.layers[2].gradient == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert seen.layers[2].weight == pytest.approx(float(model[3].weight.detach().norm()), rel=1e-5)


def test_looking_changes_nothing_of_the_model() -> None:
    """Weights, gradients and hooks are as before."""
    model = net(30)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found(model, ce)
    assert differences(before, {name: p.detach() for name, p in model.named_parameters()}) == []
    assert all(p.grad is None for p in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_layer_that_runs_often_stands_there_once() -> None:
    """The steps of a recurrent net are told together, however many there are."""
    model = nn.GRU(4, 8, batch_first=True)
    seen = measure_layers(model, None, lambda: model(torch.randn(8, 50, 4))[0].mean(), nullcontext)
    assert seen is not None
    assert len(seen.layers) < 8


def test_other_errors_are_the_callers() -> None:
    """Only a target that is none of the classes is told instead of raised."""
    model = net(30)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_layers(model, None, lambda: model(torch.randn(3, 7)).mean(), nullcontext)
    assert measure_layers(model, None, lambda: None, nullcontext) is None
