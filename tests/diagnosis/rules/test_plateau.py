"""Causes of a loss that does not move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import Case, Course, Curvature, Layer, Model
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.diagnosis.rules.plateau import oscillation
from lightning_nanguard.thresholds.diagnosis import DEFAULT, PlateauThresholds
from tests.diagnosis.rules.faults import rules_of

FLAT = Course(updates=100, first=2.3, before=2.3, now=2.29, spread=0.02, norm=1.0, lr=0.5, batch_size=32)
FALLING = replace(FLAT, before=2.0, now=1.5)
NOISY = replace(FLAT, updates=256, noise=8.0, batches=64, clear=9.0)
LOW = replace(FLAT, before=0.5, now=0.5)
NOTHING = Curvature(slope=1e-8, bend=1e-8, smallest=0.1, largest=1.0)
LAYERS = tuple(Layer(f"net.{i}", "Linear", weight=1.0, update=1e-3) for i in range(4))
LARGE = Layer("net.9", "Linear", weight=1.0, update=0.5)

ROWS: list[tuple[str | None, Case]] = [
    (None, Case(course=FLAT)),
    (None, Case(course=FLAT, curvature=replace(NOTHING, slope=1.0))),
    (None, Case(course=FLAT, curvature=Curvature(slope=1e-8, bend=1e-8))),
    ("oscillation", Case(course=replace(FLAT, opposed=-0.8))),
    (None, Case(course=replace(FALLING, opposed=-0.8))),
    (None, Case(course=replace(FLAT, before=1.0, now=3.2, opposed=-0.8))),
    # What has learned most swings about its valley, and where batches disagree each of them points back.
    (None, Case(course=replace(LOW, spread=0.005, opposed=-0.8, noise=0.5))),
    (None, Case(course=replace(FLAT, opposed=-0.8, noise=2.5))),
    ("oscillation", Case(course=replace(FLAT, opposed=-0.8, noise=0.5))),
    (None, Case(course=replace(FLAT, opposed=0.5))),
    ("saddle_point", Case(course=FLAT, curvature=replace(NOTHING, smallest=-0.5))),
    (None, Case(course=FALLING, curvature=replace(NOTHING, smallest=-0.5))),
    (None, Case(course=LOW, curvature=replace(NOTHING, smallest=-0.5))),
    ("local_minimum", Case(course=FLAT, curvature=NOTHING)),
    ("local_minimum", Case(course=FLAT, curvature=replace(NOTHING, smallest=-1e-4))),
    (None, Case(course=FLAT, curvature=replace(NOTHING, smallest=-0.03))),
    (None, Case(course=LOW, curvature=NOTHING)),
    ("local_minimum", Case(course=replace(LOW, chance=0.5), curvature=NOTHING)),
    (None, Case(course=FLAT, curvature=replace(NOTHING, smallest=0.0, largest=0.0))),
    (
        "layer_update_abnormal",
        Case(course=FLAT, model=Model((*LAYERS, LARGE), updates=100)),
    ),
    (None, Case(course=FLAT, model=Model(LAYERS, updates=100))),
    # Layers without an update are frozen or unused.
    (None, Case(course=FLAT, model=Model((LARGE, *(replace(one, update=0.0) for one in LAYERS)), updates=100))),
    ("batch_size", Case(course=replace(NOISY, batch_size=2))),
    (None, Case(course=replace(NOISY, batch_size=2, batches=8))),
    (None, Case(course=replace(NOISY, batch_size=2, clear=1.0))),
    ("batch_size", Case(course=replace(NOISY, batch_size=2, before=1.0, now=1.0))),
    (None, Case(course=replace(NOISY, batch_size=2, before=1.0, now=1.0, clear=1.0))),
    (None, Case(course=replace(NOISY, batch_size=2, updates=64))),
    (None, Case(course=replace(FLAT, batch_size=1), curvature=replace(NOTHING, smallest=-0.5))),
    (None, Case(course=replace(NOISY, batch_size=64))),
    (None, Case(course=replace(NOISY, batch_size=2, noise=1.0))),
    (None, Case(course=replace(NOISY, batch_size=2, before=2.0, now=1.5))),
]


@pytest.mark.parametrize(("cause", "case"), ROWS)
def test_the_surest_cause(cause: str | None, case: Case) -> None:
    """The surest cause above low confidence."""
    said = [finding.cause for finding in RuleSet().findings(case) if finding.confidence > 0.5]
    assert said[:1] == ([] if cause is None else [cause])


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert {cause for cause, _ in ROWS} - {None} == rules_of("plateau")


def test_thresholds_can_be_set() -> None:
    """What counts as a high loss, or as opposed gradients, is a threshold."""
    case = Case(course=replace(FLAT, opposed=-0.8))
    assert oscillation(case) is not None
    assert oscillation(case, replace(DEFAULT, plateau=PlateauThresholds(opposed=-0.9))) is None
