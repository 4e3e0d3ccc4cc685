"""Causes that lie in the model and its loss as they are, seen layer by layer in one forward and backward pass."""

from __future__ import annotations

import math
from itertools import pairwise

from lightning_nanguard.diagnosis.clues import Case, Layer, Model, Objective
from lightning_nanguard.diagnosis.rules.words import listed
from lightning_nanguard.types import Finding

UNNORMALISED = 10.0
"""Root mean square of an input from which on it counts as not normalised; pixels of 0…255 have about 150."""

# A first loss this many times that of chance comes from outputs that are far too large.
_FAR_ABOVE_CHANCE = {"cross_entropy": 3.0, "binary_cross_entropy": 3.0, "mse_loss": 30.0}
# How much a layer may enlarge what goes through it; wide layers with weights of standard deviation 1 do more.
_GAIN = 5.0
# What numbers of an untrained model rarely reach where its inputs are normalised.
_HUGE = 100.0
# Between the largest and the smallest layer of an untrained model.
_APART = 1e4
# Of the gradients of the first and the last layers.
_VANISHED = 1e-4
_VANISHED_WHERE_STILL = 1e-2
# Share of its weights that an update makes, below which a layer stands still.
_STILL = 1e-6
_EXPLODED = 1e4


def saturated_activation(case: Case) -> Finding | None:
    """Bounded activations that sit at their ends, where they pass no gradient on."""
    worst = max(_with(case, "saturated"), key=lambda layer: layer.saturated or 0.0, default=None)
    if worst is None or worst.saturated is None or worst.saturated < 0.3:
        return None
    given = _before(case.model, worst)
    scale = f" It is given numbers of about ±{given:.3g}." if given is not None and given > 1 else ""
    return Finding(
        "saturated_activation",
        0.85 if worst.saturated > 0.7 else 0.7 if worst.saturated > 0.5 else 0.4,
        evidence={"share_at_the_ends": worst.saturated, "scale_before": given if given is not None else math.nan},
        place=_named(worst),
        suggestion=(
            f"{worst.saturated:.0%} of the outputs of {_named(worst)} lie within 1 % of the ends, where the gradient "
            f"is almost zero.{scale} Normalise the inputs, initialise smaller weights (xavier_uniform_), or use an "
            "activation without an upper end, such as ReLU."
        ),
    )


def dead_relu(case: Case) -> Finding | None:
    """Rectified units that are zero for every sample, and get no gradient."""
    worst = max(_with(case, "dead"), key=lambda layer: layer.dead or 0.0, default=None)
    if worst is None or worst.dead is None or worst.dead < 0.6:
        return None
    return Finding(
        "dead_relu",
        0.9 if worst.dead > 0.95 else 0.75 if worst.dead > 0.8 else 0.4,
        evidence={"share_never_positive": worst.dead},
        place=_named(worst),
        suggestion=(
            f"{worst.dead:.0%} of the units of {_named(worst)} are zero for every sample of this batch and learn "
            "nothing. Lower the learning rate, start with biases of zero, normalise the inputs, or use LeakyReLU."
        ),
    )


def vanishing_gradient(case: Case) -> Finding | None:
    """The gradient falls layer by layer on its way back, so that the first layers stand still."""
    layers = _trained(case.model)
    if len(layers) < 3 or _starts_at_zero(case.model):
        return None
    early, late = _ends(layers)
    if not 0.0 < late < math.inf or not _falls(layers):
        return None
    if early / late > (_VANISHED_WHERE_STILL if _stand_still(layers) else _VANISHED):
        return None
    ratio = early / late
    first, last = layers[0], layers[-1]
    smallest = min(layer.outputs or 0.0 for layer in layers)
    scale = f" Activations are as small as {smallest:.1e}." if smallest < 1e-6 else ""
    # Where units sit at their ends or are dead, that is why, and they have a finding of their own.
    blocked = any((one.saturated or one.dead or 0.0) > 0.5 for one in _with(case, "kind"))
    return Finding(
        "vanishing_gradient",
        0.6 if blocked else 0.9 if ratio < 1e-6 or _stand_still(layers) else 0.75,
        evidence={"first_layer": _gradient(first), "last_layer": _gradient(last), "first_over_last": ratio},
        place=first.path,
        suggestion=(
            f"the gradient norm is {_gradient(last):.2g} in {last.path} and {_gradient(first):.2g} in {first.path}, "
            f"{len(layers) - 1} layers before: the first layers learn nothing.{scale} Use ReLU or another activation "
            "that does not saturate, Xavier or He initialisation, normalisation layers, or residual connections."
        ),
    )


def exploding_at_the_start(case: Case) -> Finding | None:
    """The gradient of an untrained model grows layer by layer toward the input."""
    layers = _trained(case.model)
    if case.model is None or case.model.updates or len(layers) < 3:
        return None
    early, late = _ends(layers)
    if not math.isfinite(early) or late == 0.0 or early / late < _EXPLODED or not _falls(layers[::-1]):
        return None
    first, last = layers[0], layers[-1]
    return Finding(
        "exploding_gradient",
        0.75,
        evidence={"first_layer": _gradient(first), "last_layer": _gradient(last), "first_over_last": early / late},
        place=first.path,
        suggestion=(
            f"the gradient norm grows from {_gradient(last):.2g} in {last.path} to {_gradient(first):.2g} in "
            f"{first.path}. Initialise smaller weights, add normalisation layers, and clip gradients: "
            "Trainer(gradient_clip_val=1.0)."
        ),
    )


def unbalanced_initialisation(case: Case) -> Finding | None:
    """An untrained model whose layers differ wildly in scale, or whose first loss is far above that of chance."""
    model = case.model
    if model is None or model.updates:
        return None
    layers = [layer for layer in model.layers if layer.weight and layer.outputs]
    steep = max(layers, key=_gain, default=None)
    largest = max(layers, key=lambda layer: layer.outputs or 0.0, default=None)
    smallest = min(layers, key=lambda layer: layer.outputs or math.inf, default=None)
    above = above_chance(model)
    too_steep = steep is not None and _gain(steep) > _GAIN
    apart = _ratio(largest, smallest)
    bad = model.loss is not None and not math.isfinite(model.loss)
    huge = largest is not None and largest.outputs is not None and largest.outputs > _HUGE
    if too_steep and (above or bad):
        confidence = 0.93
    elif too_steep and (huge or apart >= _APART):
        confidence = 0.7
    elif above or apart >= _APART:
        confidence = 0.4 if large_inputs(case) or not above else 0.7
    else:
        return None
    place = steep if too_steep else largest if apart >= _APART else None
    parts = [first_loss(model)] if above else []
    if steep is not None and too_steep:
        parts.append(f"{steep.path} makes numbers of about ±{steep.outputs:.3g} out of ±{steep.inputs:.3g}")
    elif apart >= _APART and largest is not None and smallest is not None:
        parts.append(f"{largest.path} gives ±{largest.outputs:.3g}, {smallest.path} ±{smallest.outputs:.3g}")
    return Finding(
        "unbalanced_initialisation",
        confidence,
        evidence={
            "first_loss": model.loss if model.loss is not None else math.nan,
            "chance": _chance(model),
            "largest_gain": _gain(steep) if steep is not None else math.nan,
            "largest_over_smallest": apart,
        },
        place="" if place is None else place.path,
        suggestion=(
            f"{'; '.join(parts) or 'the first loss is not finite'}. Initialise so that each layer keeps the scale of "
            "what it is given: kaiming_normal_ before ReLU, xavier_normal_ before tanh and sigmoid."
        ),
    )


def mse_for_classification(case: Case) -> Finding | None:
    """A squared loss on classes, whose gradient vanishes where the model is surely wrong."""
    objective = None if case.model is None else case.model.objective
    if objective is None or objective.classes is None or objective.function not in ("mse_loss", "squared error"):
        return None
    many = objective.classes > 2
    loss = "cross_entropy" if many else "binary_cross_entropy_with_logits"
    return Finding(
        "mse_for_classification",
        0.9 if many else 0.6,
        evidence={"classes": float(objective.classes)},
        place=_at(objective),
        suggestion=(
            f"the target tells {objective.classes} classes apart and the loss is squared, so that its gradient is "
            f"smallest where the model is surely wrong. Use torch.nn.functional.{loss} of the logits, without a "
            f"{'softmax' if many else 'sigmoid'} or other activation at the end."
        ),
    )


def double_softmax(case: Case) -> Finding | None:
    """Probabilities given to a loss that applies a softmax or sigmoid of its own."""
    objective = None if case.model is None else case.model.objective
    if objective is None or not objective.probabilities or objective.classes is None:
        return None
    # The largest score a softmax can give to one class is 1, and 0 to the others.
    least = math.log1p((objective.classes - 1) * math.exp(-1))
    binary = objective.function == "binary_cross_entropy"
    return Finding(
        "double_softmax",
        0.95,
        evidence={"classes": float(objective.classes), "least_loss": math.log1p(math.exp(-1)) if binary else least},
        place=objective.softmax,
        suggestion=(
            f"{objective.function} at {objective.line or 'the loss'} applies a {'sigmoid' if binary else 'softmax'} "
            f"itself and is given probabilities, so that its loss cannot fall below {least:.3g}. Remove the "
            f"{'sigmoid' if binary else 'softmax'} in {objective.softmax}, and apply it only where you predict."
        ),
    )


def wrong_gradient(case: Case) -> Finding | None:
    """A gradient that differs from finite differences of the loss."""
    checks = () if case.model is None else case.model.checks
    worst = max(checks, key=lambda check: (check.custom, check.error), default=None)
    if worst is None or not worst.error > 0.02:
        return None
    meant = "straight-through estimators and gradient reversal" if worst.custom else "detach and no_grad"
    return Finding(
        "wrong_gradient",
        0.9 if worst.custom else 0.6,
        evidence={"error": worst.error, "gradient": worst.analytic, "finite_differences": worst.numeric},
        place=worst.place,
        suggestion=(
            f"the backward pass of {worst.place} gives {worst.analytic:.4g} where finite differences of the forward "
            f"pass give {worst.numeric:.4g}. Correct it, and test it with torch.autograd.gradcheck; where it is meant, "
            f"as with {meant}, leave it."
        ),
    )


# ------------------------------------------------------------------------------------------------ what others ask


def above_chance(model: Model | None) -> bool:
    """Whether the loss of an untrained model is far above that of a model that knows nothing."""
    objective = None if model is None or model.updates else model.objective
    if objective is None or objective.value is None or not objective.chance:
        return False
    return objective.value > _FAR_ABOVE_CHANCE.get(objective.function, math.inf) * objective.chance


def large_inputs(case: Case) -> bool:
    """Whether the inputs are far from normalised, and nothing in the model normalises them first."""
    inputs = case.clues.inputs
    return inputs is not None and inputs.magnitude >= UNNORMALISED and not case.clues.normalises


def early_harm(model: Model | None) -> str:
    """What inputs that are too large do to an untrained model, in words; empty where they do no harm."""
    if model is None or model.updates:
        return ""
    if above_chance(model):
        return f"{first_loss(model)}; "
    first = next((layer for layer in model.layers if layer.saturated is not None), None)
    if first is None or first.saturated is None or first.saturated < 0.5:
        return ""
    return f"{first.saturated:.0%} of the outputs of {_named(first)} lie at its ends; "


def first_loss(model: Model) -> str:
    """``first loss 41.2, chance level for 10 classes is 2.3``."""
    objective = model.objective
    if objective is None or objective.value is None:
        return f"first loss {model.loss:.3g}"
    level = f"for {objective.classes} classes is" if objective.classes else "(the mean square of the target) is"
    return f"first loss {objective.value:.3g}, chance level {level} {_chance(model):.2g}"


def outside_the_classes(case: Case) -> Finding | None:
    """Class indices that the loss has no score for."""
    objective = None if case.model is None else case.model.objective
    if objective is None or objective.highest is None or objective.classes is None:
        return None
    return Finding(
        "target_out_of_domain",
        0.97,
        evidence={"highest": float(objective.highest), "classes": float(objective.classes)},
        place=_at(objective),
        samples=objective.outside,
        suggestion=(
            f"targets run from {objective.lowest} to {objective.highest}, {objective.function} of "
            f"{objective.classes} scores takes 0 to {objective.classes - 1} ({listed('sample', objective.outside)}). "
            "Fix the labels, or give the last layer more outputs."
        ),
    )


# ------------------------------------------------------------------------------------------------ layers


def _with(case: Case, what: str) -> list[Layer]:
    return [] if case.model is None else [one for one in case.model.layers if getattr(one, what) is not None]


def _before(model: Model | None, layer: Layer) -> float | None:
    layers = () if model is None else model.layers
    known = [one.outputs for one in layers[: layers.index(layer)] if one.weight]
    return known[-1] if known else None


def _trained(model: Model | None) -> list[Layer]:
    return [] if model is None else [one for one in model.layers if one.gradient is not None and one.weight]


def _starts_at_zero(model: Model | None) -> bool:
    # The last layer of a head or of a residual branch, on purpose: the gradient before it is zero for one update.
    return model is not None and any(one.weight == 0.0 for one in model.layers)


def _ends(layers: list[Layer]) -> tuple[float, float]:
    """The largest gradient of the first third, and of the last."""
    third = max(1, len(layers) // 3)
    return max(map(_gradient, layers[:third])), max(map(_gradient, layers[-third:]))


def _stand_still(layers: list[Layer]) -> bool:
    """Whether the updates of the first third are known, and next to nothing."""
    return all(one.update is not None and one.update < _STILL for one in layers[: max(1, len(layers) // 3)])


def _falls(layers: list[Layer]) -> bool:
    """Whether the gradient is mostly smaller in the earlier of two neighbours."""
    # Where nearly nothing arrives it may be as little in one as in the next.
    steps = [_gradient(a) <= 2 * _gradient(b) for a, b in pairwise(layers)]
    return sum(steps) >= 0.7 * len(steps)


def _gradient(layer: Layer) -> float:
    return layer.gradient if layer.gradient is not None else 0.0


def _gain(layer: Layer) -> float:
    return layer.outputs / layer.inputs if layer.outputs and layer.inputs else 0.0


def _ratio(largest: Layer | None, smallest: Layer | None) -> float:
    if largest is None or smallest is None or not largest.outputs or not smallest.outputs:
        return 1.0
    return largest.outputs / smallest.outputs


def _chance(model: Model) -> float:
    known = model.objective is not None and model.objective.chance is not None
    return model.objective.chance if known else math.nan  # type: ignore[union-attr,return-value]


def _named(layer: Layer) -> str:
    return f"{layer.path} ({layer.kind})"


def _at(objective: Objective) -> str:
    return f"training_step ({objective.function}{', ' if objective.line else ''}{objective.line})"
