"""What several rules ask of a fault: by its traits, not by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_nanguard import Case, Clues, Evidence, Fault
from lightning_nanguard.diagnosis.rules.signs import (
    gradient_not_finite,
    in_gradient,
    inputs_are_large,
    learner_diverged,
    number_format_exhausted,
    worse_than_before,
)
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from tests.diagnosis.rules import faults

ALL = {name: fault for name, fault in vars(faults).items() if isinstance(fault, Fault)}


@pytest.mark.parametrize(
    ("ask", "true_of"),
    [
        (in_gradient, {"GRADIENT", "SPIKE", "OVERFLOW"}),
        (gradient_not_finite, {"GRADIENT"}),
        (number_format_exhausted, {"SCALER"}),
    ],
)
def test_faults_are_told_apart_by_their_traits(ask: Callable[[Fault], bool], true_of: set[str]) -> None:
    """Each question has the same answer for a fault of another name with the same traits."""
    assert {name for name, fault in ALL.items() if ask(fault)} == true_of
    assert {name for name, fault in ALL.items() if ask(replace(fault, kind="mine"))} == true_of


def test_the_learner_diverged() -> None:
    """A fault of the learner says so itself; for another the comparison with the good weights has to."""
    known = Evidence(step=50, healthy_steps=50)
    limits = DEFAULT
    assert learner_diverged(faults.EXPLODING, known, limits)
    assert not learner_diverged(faults.SCALER, known, limits)
    assert not learner_diverged(faults.LOSS, known, limits)
    worse = replace(known, comparison=faults.WORSE, growth=5.0)
    assert worse_than_before(worse, limits)
    assert learner_diverged(faults.LOSS, worse, limits)
    assert not learner_diverged(faults.LOSS, worse, replace(limits, learner=replace(limits.learner, grown=6.0)))


def test_large_inputs() -> None:
    """Pixels are large, normal numbers are not, and a model that normalises takes both."""
    assert inputs_are_large(Case(clues=Clues(inputs=faults.PIXELS)), DEFAULT.data)
    assert not inputs_are_large(Case(clues=Clues(inputs=faults.NORMAL)), DEFAULT.data)
    assert not inputs_are_large(Case(clues=Clues(inputs=faults.PIXELS, normalises=True)), DEFAULT.data)
