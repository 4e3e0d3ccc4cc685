"""Causes that lie in the loss function, over plain numbers."""

from __future__ import annotations

import pytest

from lightning_nanguard import Case, GradientCheck, Model, Objective
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import rules_of

ROWS: list[tuple[str | None, Model]] = [
    (None, Model(objective=Objective("cross_entropy", classes=10))),
    ("double_softmax", Model(objective=Objective("cross_entropy", classes=10, probabilities=True, softmax="net.3"))),
    ("mse_for_classification", Model(objective=Objective("mse_loss", classes=10))),
    (None, Model(objective=Objective("mse_loss"))),
    ("target_out_of_domain", Model(objective=Objective("cross_entropy", classes=7, lowest=0, highest=9, outside=(3,)))),
    ("unbounded_loss", Model(objective=Objective("binary_cross_entropy", least=-1.0, most=1.0))),
    (None, Model(objective=Objective("binary_cross_entropy", least=0.0, most=1.0))),
    ("wrong_gradient", Model(checks=(GradientCheck("Mine", 0.5, 1.0, 2.0, custom=True),))),
    (None, Model(checks=(GradientCheck("Mine", 1e-6, 1.0, 1.0, custom=True),))),
]


@pytest.mark.parametrize(("cause", "model"), ROWS)
def test_the_surest_cause(cause: str | None, model: Model) -> None:
    """The surest cause of what the loss was given."""
    assert next((finding.cause for finding in RuleSet().findings(Case(model=model))), None) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("loss_function") <= {cause for cause, _ in ROWS}
