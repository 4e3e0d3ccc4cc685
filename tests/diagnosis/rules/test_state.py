"""State that became bad: when it is named, and what is said of it."""

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
    assert rules_of("state") <= {row[0] for row in ROWS}


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
