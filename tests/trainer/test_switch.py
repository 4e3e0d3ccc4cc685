"""``NANGUARD=off|observe`` in the environment switches every guard of a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nanguard import NaNGuard
from tests.checkpoints.training import guard_with, train
from tests.helpers import batches, differences, fit, state_of, task, with_bad, words
from tests.modules import SaveAt

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


def test_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NANGUARD=off a run is one without a guard, bad batches included, and leaves none of its files; the guard's
    state in a checkpoint is handed on to later runs."""
    saved = tmp_path / "on.ckpt"
    train(guard_with(), SaveAt(5, saved, stop=True))
    was = torch.load(saved, weights_only=True)["callbacks"]["NaNGuard"]
    bare = fit(task(), with_bad(4), None, folder=tmp_path / "bare")
    monkeypatch.setenv("NANGUARD", "off")
    guard = NaNGuard(preflight=True, last_good_every_n_steps=2)
    off = fit(task(), with_bad(4), guard, folder=tmp_path / "off")
    assert differences(state_of(bare), state_of(off)) == []
    assert (words(guard), guard.run_dir) == ([], None)
    assert not (tmp_path / "off").exists()
    train(guard_with(), SaveAt(9, tmp_path / "off.ckpt", stop=True), resume=saved)
    assert torch.load(tmp_path / "off.ckpt", weights_only=True)["callbacks"]["NaNGuard"] == was
    monkeypatch.setenv("NANGUARD", "")
    fit(task(), with_bad(4), guard, folder=tmp_path / "on")
    assert words(guard) == [("skip",)]


def test_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NANGUARD=observe a guard records and changes nothing; without it the same guard acts."""
    guard = NaNGuard()
    monkeypatch.setenv("NANGUARD", " Observe ")
    fit(task(), with_bad(4, count=6), guard)
    assert {record.applied for record in guard.interventions} == {False}
    monkeypatch.delenv("NANGUARD")
    fit(task(), with_bad(4, count=6), guard)
    assert guard.interventions[-1].applied


def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that means nothing ends the run before it begins, with what is expected."""
    monkeypatch.setenv("NANGUARD", "of")
    with pytest.raises(ValueError, match="NANGUARD=of in the environment: expected one of on, observe, off"):
        fit(task(), batches(), NaNGuard())
