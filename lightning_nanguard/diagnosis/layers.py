"""Measures a model layer by layer in one forward and one backward pass, and identifies its loss function.

It keeps only sums, counts and one bit for each unit, so the memory that it needs does not grow with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard.diagnosis.batch import target_fields, tensor_fields, true_indices
from lightning_nanguard.diagnosis.case import Layer, Model, Objective
from lightning_nanguard.diagnosis.gradient_trace import gradients_by_name
from lightning_nanguard.diagnosis.isolation import Untraced, isolated
from lightning_nanguard.diagnosis.operation_trace import (
    RunningModules,
    operation_name,
    storage_key,
    tensors_in,
    user_line,
)
from lightning_nanguard.measure.norms import double_norm
from lightning_nanguard.record.text import with_line
from lightning_nanguard.thresholds.diagnosis import DEFAULT, LayerThresholds

# Operations that multiply by a weight.
_PRODUCTS = frozenset(
    ["mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "embedding", "embedding_bag"]
)
# Operations whose result has the same values: views, copies and conversions of precision.
_SAME_VALUES = frozenset(
    {"to_copy", "to", "clone", "contiguous", "view", "reshape", "unsafe_view", "alias", "detach", "t", "transpose"}
    | {"permute", "expand", "unsqueeze", "squeeze", "slice", "select"}
)
# Bounded activations, with their lowest and highest output.
_BOUNDED = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0)}
_FROM_CLASSES = frozenset({"nll_loss_forward", "nll_loss2d_forward", "nll_loss", "nll_loss2d"})
_BINARY = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits"})
# What a loss must not be made of, because the loss itself applies a softmax or sigmoid.
_APPLIED_TWICE = {**dict.fromkeys(_FROM_CLASSES, "log_softmax"), "binary_cross_entropy_with_logits": "probabilities"}


def measure_layers(
    module: nn.Module,
    batch: Any,
    step: Callable[[], Tensor | None],
    untraced: Untraced,
    thresholds: LayerThresholds = DEFAULT.layers,
) -> Model | None:
    """Measure every layer while a batch runs forward and backward. Everything that the pass changes is undone.

    Args:
        module: The trained module.
        batch: The batch, which holds the targets.
        step: Runs the batch forward and returns the loss with its graph.
        untraced: A context that undoes what a run changes.
        thresholds: Limits of the measurement.

    Returns:
        The measurements; ``None`` if there was no loss.

    Raises:
        Exception: An exception of ``step``. If its cause is a target outside the classes, the result reports it
            instead.

    Example:
        >>> from contextlib import nullcontext
        >>> net, inputs = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()), torch.ones(8, 2)
        >>> seen = measure_layers(net, inputs, lambda: net(inputs).mean(), nullcontext)
        >>> [(layer.path, layer.kind) for layer in seen.layers]
        [('0', 'Linear'), ('1', 'Sigmoid')]
    """
    fields = dict(tensor_fields(batch))
    targets = [fields[name] for name in target_fields(batch, fields)]
    named = {name: p for name, p in module.named_parameters() if not isinstance(p, nn.UninitializedParameter)}
    with isolated(untraced):
        with RunningModules(module) as modules:
            trace = _LayerTrace(module, modules, named, targets, thresholds)
            try:
                with trace:
                    loss = step()
            except (IndexError, RuntimeError):
                if not any(one.outside for one in trace.objectives):
                    raise
                return Model(objective=next(one for one in trace.objectives if one.outside))
        if loss is None:
            return None
        gradients = _gradient_norms(loss, module)
        return Model(
            layers=tuple(one.layer(named, gradients) for one in trace.layers.values()),
            objective=_most_suspect(trace.objectives),
            loss=float(loss.detach().double().mean()),
        )


def _gradient_norms(loss: Tensor, module: nn.Module) -> dict[str, float]:
    if loss.grad_fn is None or loss.numel() != 1:
        return {}
    try:
        return {name: double_norm(one) for name, one in gradients_by_name(loss, module).items()}
    except RuntimeError:
        return {}  # no parameter is trained, or the graph (re-entrant checkpointing) does not support autograd.grad


def _most_suspect(objectives: Sequence[Objective]) -> Objective | None:
    """The part of a loss that is most likely at fault."""

    def suspicion(one: Objective) -> tuple[bool, bool, float]:
        above = one.value / one.chance if one.value is not None and one.chance is not None and one.chance > 0 else 0.0
        return one.probabilities, one.classes is not None, above

    return max(objectives, key=suspicion, default=None)


@dataclass(slots=True)
class _Measured:
    """The measurements of one layer so far."""

    path: str
    kind: str
    thresholds: LayerThresholds
    weights: dict[str, None] = field(default_factory=dict)
    given: list[float] = field(default_factory=lambda: [0.0, 0.0])
    made: list[float] = field(default_factory=lambda: [0.0, 0.0])
    lowest: float = math.inf
    highest: float = -math.inf
    at_ends: int | None = None
    # For each unit whether it was positive at least once. With three axes the units may lie along either of two.
    alive: tuple[Tensor, ...] = ()
    samples: int = 0

    def add_output(self, output: Tensor) -> None:
        self.made[0] += double_norm(output) ** 2
        self.made[1] += output.numel()
        if output.numel() and not output.is_complex():
            self.lowest = min(self.lowest, float(output.min()))
            self.highest = max(self.highest, float(output.max()))

    def add_input(self, tensor: Tensor) -> None:
        self.given[0] += double_norm(tensor) ** 2
        self.given[1] += tensor.numel()

    def add_bounded(self, output: Tensor, lowest: float, highest: float) -> None:
        near = self.thresholds.end_share * (highest - lowest)
        self.at_ends = (self.at_ends or 0) + int(((output < lowest + near) | (output > highest - near)).sum())

    def add_rectified(self, output: Tensor) -> None:
        if output.dim() < 2:
            return
        self.samples += len(output)
        positive = output > 0
        alive = tuple(positive.transpose(0, axis).flatten(1).any(1) for axis in sorted({1, output.dim() - 1}))
        same = [one.shape for one in self.alive] == [one.shape for one in alive]
        self.alive = tuple(a | b for a, b in zip(self.alive, alive, strict=True)) if same else alive

    def layer(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, float]) -> Layer:
        dead = [1.0 - float(one.float().mean()) for one in self.alive]
        norms = [gradients[name] for name in self.weights if name in gradients]
        return Layer(
            path=self.path,
            kind=self.kind,
            inputs=_root_mean(self.given),
            outputs=_root_mean(self.made),
            lowest=self.lowest if self.lowest <= self.highest else None,
            highest=self.highest if self.lowest <= self.highest else None,
            saturated=None if self.at_ends is None or not self.made[1] else self.at_ends / self.made[1],
            dead=min(dead) if dead and self.samples >= self.thresholds.min_samples else None,
            gradient=math.hypot(*norms) if norms else None,
            weight=math.hypot(*(double_norm(parameters[name]) for name in self.weights)) if self.weights else None,
        )


def _root_mean(sums: Sequence[float]) -> float | None:
    return math.sqrt(sums[0] / sums[1]) if sums[1] else None


@dataclass(frozen=True, slots=True)
class _Value:
    """The meaning of a tensor's values: ``"probabilities"``, ``"log_softmax"``, ``"target"``, ``"difference"``."""

    what: str
    place: str = ""
    classes: int | None = None


@final
class _LayerTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces every operation of a forward pass, and by storage the meaning of its operands."""

    def __init__(
        self,
        module: nn.Module,
        modules: RunningModules,
        parameters: Mapping[str, Tensor],
        targets: Sequence[Tensor],
        thresholds: LayerThresholds,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._thresholds = thresholds
        self._owners = {path.replace("_orig_mod.", ""): one for path, one in module.named_modules()}
        self._modules = modules
        self._weights = {storage_key(p): name for name, p in parameters.items()}
        self._learned = set(self._weights)  # storages whose values depend on a weight
        self._values = {storage_key(one): _Value("target") for one in targets}
        self._last_weight = ""
        self.layers: dict[tuple[str, str, str], _Measured] = {}
        self.objectives: list[Objective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        inputs = tensors_in((args, kwargs))
        places = [storage_key(one) for one in inputs]
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if name in _FROM_CLASSES:
            self._check_classes(inputs)
        squared = self._squared(name, inputs, given)
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if name in _FROM_CLASSES or name in _BINARY:
            self._cross_entropy(name, inputs, given, outputs[0])
        elif squared is not None:
            self._squared_error(name, squared, inputs, given, outputs[0])
        self._label(name, inputs, places, outputs)
        if outputs and outputs[0].is_floating_point() and outputs[0].layout == torch.strided:
            self._measure(name, inputs, places, outputs[0].detach(), given)
        return result

    # ------------------------------------------------------------------------------------------ what values are

    def _label(self, name: str, inputs: list[Tensor], places: list[int], outputs: list[Tensor]) -> None:
        learned = any(place in self._learned for place in places)
        same = name in _SAME_VALUES and bool(places)
        value = self._values.get(places[0]) if same else self._new_value(name, inputs, places, learned)
        weight = self._weights.get(places[0]) if same else None
        for place in map(storage_key, outputs):
            (self._learned.add if learned else self._learned.discard)(place)
            if place in places and value is None and not same:
                continue  # written in place: its label stays
            # The memory may be reused: drop the label of an earlier tensor.
            _set_or_drop(self._values, place, value)
            if place not in places:
                _set_or_drop(self._weights, place, weight)

    def _new_value(self, name: str, inputs: list[Tensor], places: list[int], learned: bool) -> _Value | None:
        if name in ("softmax", "sigmoid"):
            return _Value("probabilities", self._place(name))
        if name == "log_softmax":
            known = self._meaning(places[0], "probabilities")
            return _Value("log_softmax", "" if known is None else known.place)
        if not learned:
            return _Value("target") if any(self._is_target(place) for place in places) else None
        if name == "sub" and len(inputs) == 2:
            target = self._target_among(inputs)
            return None if target is None else _Value("difference", classes=_classes(target, self._thresholds))
        return None

    def _meaning(self, place: int, what: str | None) -> _Value | None:
        """What is known of the values at a place, if they have this meaning."""
        known = self._values.get(place)
        return known if known is not None and known.what == what else None

    def _is_target(self, place: int) -> bool:
        return self._meaning(place, "target") is not None and place not in self._learned

    def _target_among(self, inputs: list[Tensor]) -> Tensor | None:
        return next((one for one in inputs[:2] if self._is_target(storage_key(one))), None)

    def _place(self, name: str) -> str:
        return f"{self._modules.current() or 'training_step'} ({with_line(name, user_line())})"

    # ------------------------------------------------------------------------------------------ layers

    def _measure(
        self, name: str, inputs: list[Tensor], places: list[int], output: Tensor, given: Mapping[str, Any]
    ) -> None:
        if name in _PRODUCTS:
            matrices = (p for t, p in zip(inputs, places, strict=True) if p in self._weights and t.dim() > 1)
            weight = next((self._weights[place] for place in matrices), "")
            layer = self._measured_weight(weight) if weight else None
            if layer is None:
                return
            layer.weights[weight] = None
            layer.add_output(output)
            for one, place in zip(inputs, places, strict=True):
                if place not in self._weights and one.is_floating_point():
                    layer.add_input(one)
            self._last_weight = weight
            return
        rectifies = name == "relu" or (name == "hardtanh" and (given.get("min_val"), given.get("max_val")) == (0, 6))
        if not rectifies and name not in _BOUNDED:
            return
        layer = self._measured_activation(self._modules.current(), name, self._last_weight)
        if layer is None:
            return
        layer.add_output(output)
        if rectifies:
            layer.add_rectified(output)
        else:
            layer.add_bounded(output, *_BOUNDED[name])

    def _measured_weight(self, weight: str) -> _Measured | None:
        owner = weight.rpartition(".")[0].replace("_orig_mod.", "")
        module = self._owners.get(owner)
        ready_made = type(module).__module__.startswith("torch.nn")
        path = owner if ready_made else weight
        return self._entry((path, "", ""), path, type(module).__name__ if ready_made else "weight")

    def _measured_activation(self, running: str, name: str, after: str) -> _Measured | None:
        module = self._owners.get(running)
        if type(module).__module__.startswith("torch.nn.modules.activation"):
            return self._entry((running, name, after), running, type(module).__name__)
        return self._entry((running, name, after), running or "training_step", with_line(name, user_line()))

    def _entry(self, found: tuple[str, str, str], path: str, kind: str) -> _Measured | None:
        if found not in self.layers and len(self.layers) >= self._thresholds.max_layers:
            return None
        return self.layers.setdefault(found, _Measured(path, kind, self._thresholds))

    # ------------------------------------------------------------------------------------------ losses

    def _check_classes(self, inputs: list[Tensor]) -> None:
        scores, target = inputs[:2]
        classes = scores.shape[min(1, scores.dim() - 1)]
        counted = target[target >= 0] if target.dim() else target  # ignore_index is negative
        if not counted.numel() or int(counted.max()) < classes:
            return
        outside = (target >= classes).reshape(len(target), -1).any(1) if target.dim() else torch.zeros(0)
        self.objectives.append(
            Objective(
                function="cross_entropy",
                line=user_line(),
                classes=classes,
                lowest=int(counted.min()),
                highest=int(counted.max()),
                outside=true_indices(outside),
            )
        )

    def _cross_entropy(self, name: str, inputs: list[Tensor], given: Mapping[str, Any], value: Tensor) -> None:
        scores, binary = inputs[0], name in _BINARY
        classes = 2 if binary else scores.shape[min(1, scores.dim() - 1)]
        twice = self._meaning(storage_key(scores), _APPLIED_TWICE.get(name))
        softmax = "" if twice is None else twice.place
        # The chance level is known only for an unweighted mean.
        plain = value.dim() == 0 and len(inputs) == 2 and given.get("reduction", 1) == 1
        least, most = (float(inputs[1].min()), float(inputs[1].max())) if binary and inputs[1].numel() else (None, None)
        self.objectives.append(
            Objective(
                least=least,
                most=most,
                function="binary_cross_entropy" if binary else "cross_entropy",
                line=user_line(),
                classes=classes,
                probabilities=bool(softmax),
                softmax=softmax,
                value=float(value) if plain else None,
                chance=math.log(classes) if classes > 1 else None,
            )
        )

    def _squared(self, name: str, inputs: list[Tensor], given: Mapping[str, Any]) -> _Value | None:
        if name == "mse_loss":
            target = self._target_among(inputs)
            return _Value("difference", classes=None if target is None else _classes(target, self._thresholds))
        squares = name == "square" or (name == "pow" and given.get("exponent") == 2)
        if name == "mul":
            squares = len(inputs) == 2 and storage_key(inputs[0]) == storage_key(inputs[1])
        return self._meaning(storage_key(inputs[0]), "difference") if squares and inputs else None

    def _squared_error(
        self, name: str, difference: _Value, inputs: list[Tensor], given: Mapping[str, Any], value: Tensor
    ) -> None:
        target = self._target_among(inputs) if name == "mse_loss" else None
        plain = target is not None and value.dim() == 0 and given.get("reduction", 1) == 1
        # A few targets may all be near 0 by chance.
        known = target is not None and plain and target.numel() >= self._thresholds.min_samples
        self.objectives.append(
            Objective(
                function="mse_loss" if name == "mse_loss" else "squared error",
                line=user_line(),
                classes=difference.classes,
                value=float(value) if plain else None,
                chance=float(target.detach().double().square().mean()) if target is not None and known else None,
            )
        )


def _set_or_drop(table: dict[int, Any], place: int, value: Any) -> None:
    if value is None:
        table.pop(place, None)
    else:
        table[place] = value


def _classes(target: Tensor, thresholds: LayerThresholds) -> int | None:
    """Number of classes of a target of zeros and ones; ``None`` for any other target."""
    if target.dim() == 0 or target.is_complex() or bool(((target != 0) & (target != 1)).any()):
        return None
    if target.dim() > 1 and target.shape[1] > 1:
        return target.shape[1] if bool((target.sum(1) == 1).all()) else None
    binary = len(target) == target.numel() >= thresholds.min_binary_targets
    return 2 if binary and bool(target.min() != target.max()) else None
