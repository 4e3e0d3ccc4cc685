"""Causes that lie in the layers of a model, over plain numbers; ``tests/diagnosis/test_layers.py`` has real models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import Case, Layer, Model, Objective
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import rules_of

SATURATED = Layer("act", "Sigmoid", outputs=1.0, saturated=0.9)
DEAD = Layer("act", "ReLU", outputs=1.0, dead=0.99)


def layer(path: str, gradient: float, **more: float) -> Layer:
    return Layer(path, "Linear", inputs=1.0, outputs=1.0, gradient=gradient, weight=1.0, **more)


STEEP = replace(layer("net.2", 1.0), inputs=0.4, outputs=20.0)

ROWS: list[tuple[str | None, Model]] = [
    (None, Model()),
    (None, Model(layers=(layer("a", 1.0), layer("b", 1.0), layer("c", 1.0)))),
    ("exploding_gradient", Model(layers=(layer("a", 1e6), layer("b", 1e3), layer("c", 1.0)))),
    (None, Model(layers=(layer("a", 1e6), layer("b", 1e3), layer("c", 1.0)), updates=5)),
    (None, Model(layers=(layer("a", 1e6), layer("b", 1.0)))),
    ("vanishing_gradient", Model(layers=(layer("a", 1e-9), layer("b", 1e-4), layer("c", 1.0)), updates=500)),
    (None, Model(layers=(layer("a", 0.0), layer("b", 0.0), layer("c", 0.0)))),
    (None, Model(objective=Objective("cross_entropy", classes=10, value=6.0, chance=2.3))),
    (None, Model(layers=(STEEP,), objective=Objective("cross_entropy", classes=10, value=2.9, chance=2.3))),
    (
        "unbalanced_initialisation",
        Model(layers=(STEEP,), objective=Objective("cross_entropy", classes=10, value=6.0, chance=2.3)),
    ),
    ("unbalanced_initialisation", Model(objective=Objective("cross_entropy", classes=10, value=41.2, chance=2.3))),
    (None, Model(objective=Objective("cross_entropy", classes=10, value=41.2, chance=2.3), updates=9)),
    ("saturated_activation", Model(layers=(SATURATED,))),
    (None, Model(layers=(replace(SATURATED, saturated=0.2),))),
    ("dead_relu", Model(layers=(DEAD,))),
    (None, Model(layers=(replace(DEAD, dead=0.5),))),
]


@pytest.mark.parametrize(("cause", "model"), ROWS)
def test_the_surest_cause(cause: str | None, model: Model) -> None:
    """The surest cause of what was measured."""
    assert next((finding.cause for finding in RuleSet().findings(Case(model=model))), None) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("layers") <= {cause for cause, _ in ROWS}


def test_suggestions_have_numbers() -> None:
    """The first loss and the chance level are told."""
    objective = Objective("cross_entropy", classes=10, value=41.2, chance=2.3026)
    (finding,) = RuleSet().findings(Case(model=Model(objective=objective)))
    assert "first loss 41.2, chance level for 10 classes is 2.3" in finding.suggestion
