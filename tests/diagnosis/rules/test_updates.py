"""Causes that come back whenever an update is made again from the good state."""

from __future__ import annotations

import pytest

from lightning_nanguard import Case, Evidence, Fault, Finding
from lightning_nanguard.diagnosis.case import EarlierFinding
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import LOSS, rules_of

ROWS = [
    ("optimizer_update", "AdamW (float32, eps 0.0), parameter w"),
    ("forward_writes_buffer", "buffer vq.mean of Quantizer (model.py:12)"),
]


@pytest.mark.parametrize(("cause", "place"), ROWS)
def test_what_comes_back_is_named(cause: str, place: str) -> None:
    """What an update made again has shown is surer than bad state alone; later faults of the tensor have the cause."""
    tensor = "parameter w" if "parameter" in place else "buffer vq.mean"
    first = RuleSet().diagnose(Case(LOSS, Evidence(step=50, corrupt=tensor, redo_cause=(cause, place))))
    assert first is not None
    assert (first.cause, first.place, first.scope) == (cause, place, "state")
    assert first.suggestion.startswith(f"{place} is no longer finite")
    assert "device" not in first.suggestion
    earlier = (EarlierFinding(50, LOSS.kind, LOSS.place, first),)
    later = RuleSet().diagnose(Case(LOSS, Evidence(step=60, corrupt=tensor), earlier=earlier))
    assert later is not None
    assert (later.cause, later.place, later.evidence["times"]) == (cause, place, 2.0)
    written = Fault("non_finite_statistics", "batch", tensor, conclusive=True)
    skipped = RuleSet().diagnose(Case(written, Evidence(step=60), earlier=earlier))
    assert skipped is not None
    assert (skipped.cause, skipped.place) == (cause, place)
    other = RuleSet().diagnose(Case(LOSS, Evidence(step=60, corrupt="parameter other"), earlier=earlier))
    assert other is not None
    assert other.cause == "corrupted_state"


def test_weights_that_grew_far_are_the_cause_of_a_buffer_that_overflows() -> None:
    """Any number overflows below weights of ten thousand times their size, so the rate is named. The step of an
    optimizer that divides by 0 makes weights as large by itself."""
    for (cause, place), named in zip(ROWS, ("optimizer_update", "learning_rate_too_high"), strict=True):
        known = Evidence(step=50, corrupt="buffer vq.mean", redo_cause=(cause, place), growth=1e4, lr=1e4)
        finding = RuleSet().diagnose(Case(LOSS, known))
        assert finding is not None
        assert finding.cause == named


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("updates") == {row[0] for row in ROWS}


def test_bad_state_after_a_suspicion_is_not_said_to_come_from_nowhere() -> None:
    """Where the user was told of a huge finite gradient since the last good state, that is what is said."""
    told = "at update 48 the gradient norm is 1e+25, usually 1.3"
    earlier = tuple(
        EarlierFinding(step, LOSS.kind, LOSS.place, Finding("corrupted_state", 0.9, place="parameter w"))
        for step in (10, 30)
    )
    finding = RuleSet().diagnose(Case(LOSS, Evidence(step=50, corrupt="parameter w", told=told), earlier=earlier))
    assert finding is not None
    assert finding.cause == "corrupted_state"
    assert told in finding.suggestion
    assert "no earlier reading" not in finding.suggestion
    assert "device" not in finding.suggestion
