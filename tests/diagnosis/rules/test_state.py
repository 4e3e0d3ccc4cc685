"""State that became bad, by itself or in an update that makes it so each time: when it is named, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Case, Clues, Evidence, Fault, Finding, Origin
from lightning_nanguard.diagnosis.case import EarlierFinding
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import (
    BY_HAND,
    CORRUPTED,
    EXP,
    FAR_OUT,
    LARGE,
    LOSS,
    MOMENT,
    MOVED,
    OVERFLOW,
    STUCK,
    WORSE,
    Row,
    rules_of,
    surest_cause,
)

COMING_BACK = [
    ("optimizer_update", "AdamW (float32, eps 0.0), parameter w"),
    ("forward_writes_buffer", "buffer vq.mean of Quantizer (model.py:12)"),
]


@pytest.mark.parametrize(("cause", "place"), COMING_BACK)
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
    for (cause, place), named in zip(COMING_BACK, ("optimizer_update", "learning_rate_too_high"), strict=True):
        known = Evidence(step=50, corrupt="buffer vq.mean", redo_cause=(cause, place), growth=1e4, lr=1e4)
        finding = RuleSet().diagnose(Case(LOSS, known))
        assert finding is not None
        assert finding.cause == named


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


ROWS: list[Row] = [
    ("corrupted_state", CORRUPTED, {"corrupt": "buffer b"}, Clues()),
    ("corrupted_state", LOSS, {"jump": "parameter w", "comparison": WORSE}, Clues(origin=Origin("exp", highest=1e30))),
    ("corrupted_state", LOSS, {}, Clues(change=MOVED, good_finite=True, origin=Origin("exp", highest=1e5))),
    ("corrupted_state", FAR_OUT, {}, Clues()),
    # A buffer that an earlier update made bad, and the good state is finite.
    ("corrupted_state", LOSS, {}, Clues(bad_buffers=("cb",), spoilt_buffers=("cb",), origin=EXP)),
    ("corrupted_state", MOMENT, {}, Clues()),
    # The updates since the snapshot, made again, did not make it so, whatever else speaks against the rate.
    ("corrupted_state", LARGE, {"redone": True, "growth": 1e6, "climbing": True}, Clues(moved_alone=False)),
    ("corrupted_state", LARGE, {"redone": True, "comparison": WORSE, "rate_rose": True, "lr": 0.5}, Clues()),
    # State that is not finite is bad by itself, whatever question was due.
    ("corrupted_state", STUCK, {"corrupt": "buffer b"}, Clues()),
    # A weight of which an element was overwritten.
    ("corrupted_state", LARGE, {"growth": 1e5, "jump": "parameter w"}, Clues(moved_alone=True)),
    ("corrupted_state", LARGE, {"growth": 1e5, "jump": "parameter w"}, Clues()),
    ("corrupted_state", OVERFLOW, {**BY_HAND, "jump": "parameter w"}, Clues()),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), ROWS)
def test_the_surest_cause(cause: str, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """Bad state is named where no batch and no update explains it, and it is the surest cause there."""
    assert surest_cause(fault, known, clues) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("state") <= {row[0] for row in (*ROWS, *COMING_BACK)}


@pytest.mark.parametrize(("since", "said"), [(0, "again at once after"), (1, "again 1 update after")])
def test_a_state_that_is_bad_again_after_a_rollback(since: int, said: str) -> None:
    """The words name no count of faults, and everything that may write to the state between two updates."""
    first = Finding("corrupted_state", 0.9, place="parameter w")
    earlier = (EarlierFinding(8, LOSS.kind, LOSS.place, first),)
    known = Evidence(step=9, corrupt="parameter w", healthy_since_restore=since)
    finding = RuleSet().diagnose(Case(LOSS, known, earlier=earlier))
    assert finding is not None
    assert finding.suggestion == (
        f"parameter w is no longer finite, {said} a rollback. Look for code that writes to it: a callback, a hook, the "
        "forward pass or the optimizer."
    )
