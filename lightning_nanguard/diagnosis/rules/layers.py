"""Rules for causes in the layers of a model, measured in one forward and backward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from lightning_nanguard.diagnosis.case import Case, Layer, Model
from lightning_nanguard.diagnosis.rules.loss_function import above_chance, chance_level, first_loss
from lightning_nanguard.diagnosis.rules.signs import inputs_are_large
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, ModelThresholds
from lightning_nanguard.types import Finding

_NO_LAYER = Layer("", "")
"""Stands for a layer where a model has none."""


def saturated_activation(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Outputs of bounded activations are at their lowest or highest value, where they have almost no gradient."""
    limits, known = thresholds.model, thresholds.confidence
    worst = max(_layers(case), key=_saturated, default=_NO_LAYER)
    share = _saturated(worst)
    if share < limits.saturated_some:
        return None
    if share > limits.saturated_most:
        confidence = known.saturated_most
    else:
        confidence = known.saturated_half if share > limits.saturated_half else known.saturated_some
    given = _outputs_before(_layers(case), worst)
    scale = f" Its inputs are about ±{given:.3g}." if given is not None and given > 1 else ""
    return Finding(
        "saturated_activation",
        confidence,
        evidence={"share_at_the_ends": share, "scale_before": given if given is not None else math.nan},
        place=_named(worst),
        suggestion=(
            f"{share:.0%} of the outputs of {_named(worst)} lie within 1 % of its lowest or highest value, "
            f"where the gradient is almost zero.{scale} Normalise the inputs, start from smaller weights "
            "(xavier_uniform_), or use an activation without an upper limit, such as ReLU."
        ),
    )


def dead_relu(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Rectified units that are zero for every sample, and get no gradient."""
    limits, known = thresholds.model, thresholds.confidence
    worst = max(_layers(case), key=_dead, default=_NO_LAYER)
    share = _dead(worst)
    if share < limits.dead_some:
        return None
    if share > limits.dead_all:
        confidence = known.dead_all
    else:
        confidence = known.dead_most if share > limits.dead_most else known.dead_some
    # Without an update the learning rate is not the cause.
    lower = "S" if case.model is None or not case.model.updates else "Lower the learning rate, s"
    return Finding(
        "dead_relu",
        confidence,
        evidence={"share_never_positive": share},
        place=_named(worst),
        suggestion=(
            f"{share:.0%} of the units of {_named(worst)} are zero for every sample of this batch and learn "
            f"nothing. {lower}tart with biases of zero, normalise the inputs, or use LeakyReLU."
        ),
    )


def vanishing_gradient(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The gradient becomes smaller layer by layer toward the input, so that the first layers do not change."""
    limits, known = thresholds.model, thresholds.confidence
    layers = _layers_with_gradient(case)
    # The last layer of a head or residual branch may start at zero on purpose. Then earlier gradients are zero, too.
    if len(layers) < limits.min_layers or any(one.weight == 0.0 for one in _layers(case)):
        return None
    early, late = _end_gradients(layers)
    if not 0.0 < late < math.inf or not _falls(layers, limits):
        return None
    ratio, still = early / late, _stand_still(layers, limits)
    if ratio > (limits.vanished_while_still if still else limits.vanished):
        return None
    first, last = layers[0], layers[-1]
    smallest = min(map(_outputs, layers))
    scale = f" Activations are as small as {smallest:.1e}." if smallest < limits.small_activation else ""
    # If units are saturated or dead, this is the cause, and another rule reports it.
    blocked = any((_saturated(one) or _dead(one)) > limits.saturated_half for one in _layers(case))
    proven = ratio < limits.vanished_surely or still
    return Finding(
        "vanishing_gradient",
        known.vanishing_blocked if blocked else known.vanishing_proven if proven else known.vanishing,
        evidence={"first_layer": _gradient(first), "last_layer": _gradient(last), "first_over_last": ratio},
        place=first.path,
        suggestion=(
            f"the gradient norm is {_gradient(last):.2g} in {last.path} and {_gradient(first):.2g} in {first.path}, "
            f"{len(layers) - 1} layers earlier: the first layers learn nothing.{scale} Use ReLU or another activation "
            "that does not saturate, Xavier or He initialisation, normalisation layers, or residual connections."
        ),
    )


def exploding_initial_gradient(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The gradient of an untrained model grows layer by layer toward the input."""
    limits = thresholds.model
    layers = _layers_with_gradient(case)
    if case.model is None or case.model.updates or len(layers) < limits.min_layers:
        return None
    early, late = _end_gradients(layers)
    if not math.isfinite(early) or late == 0.0 or early / late < limits.exploded or not _falls(layers[::-1], limits):
        return None
    first, last = layers[0], layers[-1]
    return Finding(
        "exploding_gradient",
        thresholds.confidence.gradient_initial,
        evidence={"first_layer": _gradient(first), "last_layer": _gradient(last), "first_over_last": early / late},
        place=first.path,
        suggestion=(
            f"the gradient norm grows from {_gradient(last):.2g} in {last.path} to {_gradient(first):.2g} in "
            f"{first.path}. Start from smaller weights, add normalisation layers, and clip gradients: "
            "Trainer(gradient_clip_val=1.0)."
        ),
    )


def unbalanced_initialisation(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """An untrained model whose layers differ widely in scale, or whose first loss is far above chance."""
    model, limits, known = case.model, thresholds.model, thresholds.confidence
    if model is None or model.updates:
        return None
    layers = [layer for layer in model.layers if layer.weight and layer.outputs]
    steep = max(layers, key=_gain, default=_NO_LAYER)
    largest = max(layers, key=_outputs, default=_NO_LAYER)
    smallest = min(layers, key=_outputs, default=_NO_LAYER)
    above = above_chance(model, limits)
    too_steep = _gain(steep) > limits.max_gain
    ratio = _outputs(largest) / _outputs(smallest) if layers else 1.0
    apart = ratio >= limits.scales_apart
    bad = model.loss is not None and not math.isfinite(model.loss)
    huge = _outputs(largest) > limits.huge_activation
    steeply = too_steep and above_chance(model, replace(limits, cross_entropy_above_chance=limits.steep_above_chance))
    if too_steep and (above or bad):
        confidence = known.unbalanced_proven
    elif too_steep and (steeply or huge or apart):
        confidence = known.unbalanced
    elif above or apart:
        guess = inputs_are_large(case, thresholds.data) or not above
        confidence = known.unbalanced_guess if guess else known.unbalanced
    else:
        return None
    place = steep if too_steep else largest if apart else _NO_LAYER
    parts = [first_loss(model)] if above or steeply else []
    if too_steep:
        parts.append(f"{steep.path} turns inputs of about ±{steep.inputs:.3g} into outputs of ±{steep.outputs:.3g}")
    elif apart:
        parts.append(
            f"outputs are ±{largest.outputs:.3g} in {largest.path} and ±{smallest.outputs:.3g} in {smallest.path}"
        )
    return Finding(
        "unbalanced_initialisation",
        confidence,
        evidence={
            "first_loss": model.loss if model.loss is not None else math.nan,
            "chance": chance_level(model),
            "largest_gain": _gain(steep) if layers else math.nan,
            "largest_over_smallest": ratio,
        },
        place=place.path,
        suggestion=(
            f"{'; '.join(parts) or 'the first loss is not finite'}. Initialise so that each layer keeps the scale of "
            "its inputs: kaiming_normal_ before ReLU, xavier_normal_ before tanh and sigmoid."
        ),
    )


def harm_of_large_inputs(model: Model | None, thresholds: ModelThresholds) -> str:
    """The harm that too large inputs do to an untrained model, in words; empty if there is none."""
    if model is None or model.updates:
        return ""
    if above_chance(model, thresholds):
        return f"{first_loss(model)}; "
    first = next((layer for layer in model.layers if layer.saturated is not None), None)
    if first is None or first.saturated is None or first.saturated < thresholds.saturated_half:
        return ""
    return f"{first.saturated:.0%} of the outputs of {_named(first)} lie at its lowest or highest value; "


def _layers(case: Case) -> tuple[Layer, ...]:
    return () if case.model is None else case.model.layers


def _layers_with_gradient(case: Case) -> list[Layer]:
    return [one for one in _layers(case) if one.gradient is not None and one.weight]


def _outputs_before(layers: tuple[Layer, ...], layer: Layer) -> float | None:
    """Root mean square of the output of the last layer with a weight before a layer."""
    known = [one.outputs for one in layers[: layers.index(layer)] if one.weight]
    return known[-1] if known else None


def _end_gradients(layers: list[Layer]) -> tuple[float, float]:
    """The largest gradient in the first third of the layers, and in the last third."""
    third = max(1, len(layers) // 3)
    return max(map(_gradient, layers[:third])), max(map(_gradient, layers[-third:]))


def _stand_still(layers: list[Layer], thresholds: ModelThresholds) -> bool:
    """Whether the updates of the first third of the layers are known and almost zero."""
    first = layers[: max(1, len(layers) // 3)]
    return all(one.update is not None and one.update < thresholds.still_update for one in first)


def _falls(layers: list[Layer], thresholds: ModelThresholds) -> bool:
    """Whether in most pairs of neighbouring layers the earlier one has the smaller gradient."""
    # Gradients that are almost zero may be equal in both layers.
    steps = [_gradient(a) <= thresholds.neighbour_factor * _gradient(b) for a, b in pairwise(layers)]
    return sum(steps) >= thresholds.falling_share * len(steps)


def _gradient(layer: Layer) -> float:
    return layer.gradient or 0.0


def _saturated(layer: Layer) -> float:
    return layer.saturated or 0.0


def _dead(layer: Layer) -> float:
    return layer.dead or 0.0


def _outputs(layer: Layer) -> float:
    return layer.outputs or 0.0


def _gain(layer: Layer) -> float:
    return layer.outputs / layer.inputs if layer.outputs and layer.inputs else 0.0


def _named(layer: Layer) -> str:
    return f"{layer.path} ({layer.kind})"
