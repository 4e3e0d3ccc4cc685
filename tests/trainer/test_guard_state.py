"""What a guard keeps from fit to fit and in checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.guard_state import STATE_SCHEMA
from tests.helpers import batches, fit, task, with_nan


def test_before_a_fit_there_is_nothing_to_keep() -> None:
    """No state, no run, no multiplier other than 1, no clipping."""
    guard = NaNGuard()
    assert guard.state_dict() == {}
    assert (guard.run_id, guard.lr_multiplier, guard.non_finite_rate, guard.clip_val) == (None, 1.0, None, None)


def test_what_is_kept_after_a_fit(tmp_path: Path) -> None:
    """The run, the count of interventions, and the guard's own state, for a guard that goes on."""
    guard, later = NaNGuard(), NaNGuard()
    fit(task(), [with_nan(one) if at == 3 else one for at, one in enumerate(batches())], guard, folder=tmp_path)
    state = guard.state_dict()
    assert (state["schema"], state["run"], state["interventions"]) == (STATE_SCHEMA, guard.run_id, 1)
    later.load_state_dict(state)
    fit(task(), batches(), later, folder=tmp_path)
    assert later.run_id == guard.run_id
    assert later.state_dict()["guard"]["step"] == state["guard"]["step"] + len(batches())


def test_a_guard_that_is_switched_off_hands_on_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without the guard, by its environment, goes on from a checkpoint and keeps the guard's state for later."""
    monkeypatch.setenv("NANGUARD", "off")
    guard, given = NaNGuard(), {"schema": STATE_SCHEMA, "guard": {"of": "an earlier run"}}
    guard.load_state_dict(given)
    fit(task(), batches(), guard, folder=tmp_path)
    assert guard.state_dict() == given
