"""Rules for causes in the loss function, its inputs and its gradient."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.case import Case, Model
from lightning_nanguard.diagnosis.rules.phrases import listed
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, ModelThresholds
from lightning_nanguard.types import Finding


def mse_for_classification(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A classifier with a squared loss, whose gradient is smallest for confident wrong predictions."""
    objective = None if case.model is None else case.model.objective
    if objective is None or objective.classes is None or objective.function not in ("mse_loss", "squared error"):
        return None
    many = objective.classes > 2
    known = thresholds.confidence
    loss = "cross_entropy" if many else "binary_cross_entropy_with_logits"
    return Finding(
        "mse_for_classification",
        known.mse_many_classes if many else known.mse_two_classes,
        evidence={"classes": float(objective.classes)},
        place=objective.place,
        suggestion=(
            f"the target has {objective.classes} classes and the loss is squared, so that its gradient is smallest "
            f"where the model is wrong with high confidence. Use torch.nn.functional.{loss} of the logits, without a "
            f"{'softmax' if many else 'sigmoid'} or other activation at the end."
        ),
    )


def double_softmax(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Probabilities are the input of a loss that applies a softmax or sigmoid itself."""
    objective = None if case.model is None else case.model.objective
    if objective is None or not objective.probabilities or objective.classes is None:
        return None
    # The best case: a softmax gives 1 to the right class and 0 to the others.
    least = math.log1p((objective.classes - 1) * math.exp(-1))
    binary = objective.function == "binary_cross_entropy"
    return Finding(
        "double_softmax",
        thresholds.confidence.double_softmax,
        evidence={"classes": float(objective.classes), "least_loss": math.log1p(math.exp(-1)) if binary else least},
        place=objective.softmax,
        suggestion=(
            f"{objective.function} at {objective.line or 'the loss'} applies a {'sigmoid' if binary else 'softmax'} "
            f"itself and is given probabilities, so that its loss cannot fall below {least:.3g}. Remove the "
            f"{'sigmoid' if binary else 'softmax'} in {objective.softmax}, and apply it only where you predict."
        ),
    )


def wrong_gradient(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A gradient that differs from finite differences of the loss."""
    checks = () if case.model is None else case.model.checks
    worst = max(checks, key=lambda check: (check.custom, check.error), default=None)
    if worst is None or not worst.error > thresholds.model.gradient_error:
        return None
    known = thresholds.confidence
    meant = "straight-through estimators and gradient reversal" if worst.custom else "detach and no_grad"
    return Finding(
        "wrong_gradient",
        known.wrong_custom_gradient if worst.custom else known.wrong_gradient,
        evidence={"error": worst.error, "gradient": worst.analytic, "finite_differences": worst.numeric},
        place=worst.place,
        suggestion=(
            f"the backward pass of {worst.place} gives {worst.analytic:.4g} where finite differences of the forward "
            f"pass give {worst.numeric:.4g}. Correct it, and test it with torch.autograd.gradcheck. If the difference "
            f"is intended, as with {meant}, ignore this."
        ),
    )


def class_out_of_range(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Class indices for which the model has no score."""
    objective = None if case.model is None else case.model.objective
    if objective is None or objective.highest is None or objective.classes is None:
        return None
    return Finding(
        "target_out_of_domain",
        thresholds.confidence.target_class,
        evidence={"highest": float(objective.highest), "classes": float(objective.classes)},
        place=objective.place,
        samples=objective.outside,
        suggestion=(
            f"targets run from {objective.lowest} to {objective.highest}, but {objective.function} of "
            f"{objective.classes} scores takes 0 to {objective.classes - 1} ({listed('sample', objective.outside)}). "
            "Fix the labels, or give the last layer more outputs."
        ),
    )


def unbounded_loss(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Targets outside the range from 0 to 1, for which a binary cross-entropy has no lower bound."""
    objective = None if case.model is None else case.model.objective
    if objective is None or objective.least is None or objective.most is None:
        return None
    if objective.least >= 0.0 and objective.most <= 1.0:
        return None
    return Finding(
        "unbounded_loss",
        thresholds.confidence.unbounded_loss,
        evidence={"lowest": objective.least, "highest": objective.most},
        place=objective.place,
        suggestion=(
            f"targets run from {objective.least:.4g} to {objective.most:.4g}, but a binary cross-entropy needs targets "
            "from 0 to 1: with other targets the loss has no lower limit. Scale the targets to the range from 0 to 1, "
            "or use another loss."
        ),
    )


def above_chance(model: Model | None, thresholds: ModelThresholds) -> bool:
    """Whether the loss of an untrained model is far above that of a model that knows nothing."""
    objective = None if model is None or model.updates else model.objective
    if objective is None or objective.value is None or not objective.chance:
        return False
    factors = {
        "cross_entropy": thresholds.cross_entropy_above_chance,
        "binary_cross_entropy": thresholds.cross_entropy_above_chance,
        "mse_loss": thresholds.mse_above_chance,
    }
    return objective.value > factors.get(objective.function, math.inf) * objective.chance


def first_loss(model: Model) -> str:
    """The first loss in words, such as ``first loss 41.2, chance level for 10 classes is 2.3``."""
    objective = model.objective
    if objective is None or objective.value is None:
        return f"first loss {model.loss:.3g}"
    level = f"for {objective.classes} classes is" if objective.classes else "(the mean square of the target) is"
    return f"first loss {objective.value:.3g}, chance level {level} {chance_level(model):.2g}"


def chance_level(model: Model) -> float:
    """The loss of a model that knows nothing; NaN if the level is not known."""
    objective = model.objective
    return math.nan if objective is None or objective.chance is None else objective.chance
