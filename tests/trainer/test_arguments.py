"""The arguments of NaNGuard are checked where they are given, by name and value, and ``NANGUARD=off|observe`` in the
environment switches every guard of a process."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard import Budget, NaNGuard, NonFinite, ReduceLR, Rollback
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.detection import DetectionThresholds
from tests.checkpoints.training import guard_with, train
from tests.helpers import batches, differences, fit, state_of, task, with_bad, words
from tests.modules import SaveAt

WRONG_VALUES: list[tuple[str, list[Any], str]] = [
    ("snapshot_every_n_steps", [0, -3, 1.5, True, "often", None], '"auto" or an integer of at least 1'),
    ("snapshot_device", ["cuda:9", "disk", "", None], "one of .*'same'"),
    ("max_snapshots", [0, -1, 2.5, True, "three", None], "an integer of at least 1"),
    ("max_snapshot_memory", [0, -0.5, "1GiB", True], "a number of GiB above 0, or None"),
    ("readback", ["never", "Step", ""], "one of .*'deferred'"),
    ("examine_after", [0, 15, 16.0, True, "soon"], "None or an integer of at least 16"),
    ("last_good_every_n_steps", [0, -1, 2.5, True], "an integer of at least 1, or None"),
    ("resume", ["never", "last_good", None], "one of .*'last-good'"),
    ("act_on", ["never", "Evidence", "", None], r"one of \('certain', 'evidence'\)"),
]

RIGHT_VALUES: list[tuple[str, list[Any]]] = [
    ("snapshot_every_n_steps", [1, 1000]),
    ("snapshot_device", ["same", "cpu"]),
    ("max_snapshots", [1]),
    ("max_snapshot_memory", [1, 0.001]),
    ("readback", ["step", "deferred"]),
    ("examine_after", [16]),
    ("last_good_every_n_steps", [1]),
    ("resume", ["last-good"]),
    ("act_on", ["evidence"]),
    ("detectors", [[], ()]),
    ("remedies", [[], ()]),
]

WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("detectors", "NonFinite", r"detectors='NonFinite'\): expected a list of Detector instances"),
    ("detectors", NonFinite(), "detectors=.*expected a list of Detector instances"),
    ("detectors", [NonFinite], r"is not an instance of Detector; write NonFinite\(\)"),
    ("detectors", [Rollback()], "detectors=.*is not an instance of Detector"),
    ("remedies", [Rollback], r"is not an instance of Remedy; write Rollback\(\)"),
    ("remedies", [Rollback(), 0.5], r"0\.5 is not an instance of Remedy"),
    ("budget", 20, r"budget=20\): expected a Budget, but got int"),
    ("on_intervention", "print", r"on_intervention='print'\): expected a callable"),
    ("thresholds", DetectionThresholds(), "thresholds=DetectionThresholds.*expected a Thresholds object.*detection="),
]


def cases(rows: list[Any]) -> list[Any]:
    return [pytest.param(row[0], one, *row[2:], id=f"{row[0]}-{one!r}") for row in rows for one in row[1]]


@pytest.mark.parametrize(("argument", "value", "expected"), cases(WRONG_VALUES))
def test_a_value_out_of_its_range_is_refused(argument: str, value: Any, expected: str) -> None:
    """The message names the argument as the user gave it, its value, and what was expected."""
    with pytest.raises(ValueError, match=rf"NaNGuard\({argument}=.*\): expected {expected}") as error:
        NaNGuard(**{argument: value})
    assert f"{argument}={value!r}" in str(error.value)


@pytest.mark.parametrize(("argument", "value"), cases(RIGHT_VALUES))
def test_a_value_at_the_edge_of_its_range_is_taken(argument: str, value: Any) -> None:
    """As it was given."""
    assert getattr(NaNGuard(**{argument: value})._arguments, argument) == value


@pytest.mark.parametrize(("argument", "value", "message"), WRONG_TYPES)
def test_a_value_of_the_wrong_kind_is_refused(argument: str, value: Any, message: str) -> None:
    """With what to write instead where a class was given for an instance."""
    with pytest.raises(TypeError, match=rf"NaNGuard\(.*{message}"):
        NaNGuard(**{argument: value})


def test_two_remedies_for_one_step_are_refused() -> None:
    """By the names of both."""
    with pytest.raises(ValueError, match="ReduceLR and ReduceLR both carry out Scale"):
        NaNGuard(remedies=[ReduceLR(0.5), ReduceLR(0.1)])


def test_bundles_without_safetensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, by the name of the extra, and not at the first incident."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[bundle\]"):
        NaNGuard(bundle_dir="bundles")


def test_arguments_cannot_be_changed_later() -> None:
    """What was checked is what is used, with the defaults in place of ``None``."""
    given = NaNGuard(dirpath="runs")._arguments
    assert (given.thresholds, given.budget, given.sinks, given.dirpath) == (Thresholds(), Budget(), (), Path("runs"))
    with pytest.raises(FrozenInstanceError, match="observe"):
        given.observe = True  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
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


def test_observing(monkeypatch: pytest.MonkeyPatch) -> None:
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
