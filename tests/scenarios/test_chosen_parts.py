"""What the user chose is kept to: short lists of remedies, no detectors, observing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard import (
    ClipGradients,
    NaNGuard,
    ReduceLR,
    ResetMoments,
    Rollback,
    SkipStep,
    StopTraining,
    TrainingDivergedError,
)
from tests.helpers import (
    FaultAt,
    States,
    data_for,
    differences,
    fit,
    learner_of,
    non_finite,
    state_of,
    task,
    words,
)
from tests.scenarios.struck import NAN, STEPS, WAYS, adam, assert_sound, struck


@pytest.mark.parametrize("remedies", [[], [SkipStep()], [StopTraining()]], ids=["none", "skip", "stop"])
def test_bad_batch_is_skipped_whatever_remedies_are_listed(remedies: list[Any], tmp_path: Path) -> None:
    """Remedies are for what a skip cannot help: a bad batch is skipped without any of them."""
    guard = NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("input", NAN, 12), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [("skip",)]


@pytest.mark.parametrize("remedies", [[], [SkipStep()], [StopTraining()]], ids=["none", "skip", "stop"])
def test_lost_state_stops_where_no_remedy_may_bring_it_back(remedies: list[Any], tmp_path: Path) -> None:
    """Without a remedy that helps, a lost learner ends the run at once, with the last good weights in place."""
    states, guard = States(), NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    module = task("mlp", adam)
    with pytest.raises(TrainingDivergedError, match=r"parameter net\.0\.weight") as error:
        fit(
            module,
            data_for("mlp", STEPS),
            guard,
            folder=tmp_path,
            callbacks=[states, FaultAt("weight", NAN, 17)],
        )
    assert words(guard) == [("stop",)]
    assert error.value.snapshot_step is not None
    good = states.after[error.value.snapshot_step]["parameters"]
    assert differences(dict(module.named_parameters()), good) == []


@pytest.mark.parametrize(
    "remedies",
    [
        [Rollback()],
        [ReduceLR(), Rollback()],
        [ClipGradients(), Rollback(), StopTraining()],
        [ResetMoments(), Rollback()],
    ],
    ids=["rollback", "rate first", "clip first", "moments first"],
)
def test_lost_state_is_restored_and_nothing_else(remedies: list[Any], tmp_path: Path) -> None:
    """State that went bad by itself is rolled back only, in whatever order the remedies stand."""
    guard = NaNGuard(remedies=remedies, snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("weight", NAN, 17), guard, tmp_path)
    assert_sound(run, guard)
    assert words(guard) == [("restore", "redo")]


def test_without_detectors_nothing_is_found_but_in_the_state(tmp_path: Path) -> None:
    """``detectors=[]`` leaves a bad loss alone; a snapshot is still never certified with a bad weight in it."""
    guard = NaNGuard(detectors=[], snapshot_every_n_steps=5)
    run = struck("automatic", FaultAt("loss", NAN, 12), guard, tmp_path)
    assert {found.fault for found in guard.interventions} <= {"corrupted_state"}
    assert non_finite(learner_of(run.trainer, run.module)) == []


OBSERVED = [
    (way, kind)
    for way in WAYS
    for kind in ("input", "loss", "gradient", "weight", "buffer", "moment")
    if (way, kind) != ("manual", "buffer")  # the module trained by hand has none
]


@pytest.mark.parametrize(("way", "kind"), OBSERVED)
def test_observing_changes_nothing(way: str, kind: str, tmp_path: Path) -> None:
    """With ``observe=True`` the run is the bare one bit by bit, also when it goes NaN for good; what would have been
    done is on record and marked as not applied."""
    model = "manual" if way == "manual" else "norm"
    data = data_for(model, 20)
    guard = NaNGuard(observe=True, snapshot_every_n_steps=3)
    ended = []
    for watching in (None, guard):
        fault = FaultAt(kind, NAN, 12)
        run = fit(task(model, adam), data, watching, folder=tmp_path, callbacks=[fault], **WAYS[way])
        state = state_of(run)
        state["logged"] = [
            (step, {key: value for key, value in row.items() if not key.startswith("nanguard")})
            for step, row in state["logged"]
            if not any(key.startswith("nanguard") for key in row)
        ]
        for metrics in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
            state[metrics].pop("nanguard", None)
        ended.append(state)
    assert differences(*ended) == []
    assert guard.interventions
    assert not any(found.applied for found in guard.interventions)
    skip, averages = ("skip",), ("restore averages",) if model == "norm" else ("restore",)
    expected = {"input": skip, "loss": skip, "gradient": skip, "buffer": averages}.get(kind, ("restore",))
    assert guard.interventions[0].remedies == expected
    blamed = [one.finding.suggestion for one in guard.interventions[1:] if one.cause == "corrupted_state"]
    # What an update that was only observed has ruined is not said to have gone bad by itself.
    assert not any("no earlier reading was bad" in text for text in blamed)
    assert not blamed or all("an earlier fault may be the reason" in text for text in blamed)
