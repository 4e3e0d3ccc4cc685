"""Incidents of a run are kept in folders of their own, a bounded number of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lightning_nanguard import Fault, Finding, NaNGuard
from lightning_nanguard.diagnosis.bundle import Bundle, read
from lightning_nanguard.diagnosis.bundle_store import BundleStore
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.thresholds.diagnosis import BundleThresholds
from lightning_nanguard.types import Evidence
from tests.classifier import Model, Numbers
from tests.helpers import FaultAt, trainer_for

pytest.importorskip("safetensors")
NAN = math.nan


def test_incidents_are_bounded_and_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three incidents of a kind are kept, and a folder that cannot be written to costs the run nothing."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    for folder, kept in ((tmp_path / "all", 3), (blocked, 0)):
        guard = NaNGuard(bundle_dir=folder)
        trainer = trainer_for(tmp_path, guard, [FaultAt("input", NAN, range(3, 9))], max_epochs=3)
        trainer.fit(Model(), Numbers())
        assert len(guard.interventions) == 6
        assert len([*folder.glob("step_*")]) == kept
    assert "could not be saved" in caplog.text


def test_folders_have_names_of_their_own(tmp_path: Path) -> None:
    """Two incidents of one step lie side by side, none is left half written, and each kind has a bound of its own."""
    store = BundleStore(tmp_path, BundleThresholds(max_bundles=3, max_per_kind=2))
    fault = Fault("non_finite_loss", "batch", "loss")
    bundle = Bundle("m:C", {}, fault, Evidence(1), None, [MicroBatch(1, 0, torch.zeros(2), ())], {})
    paths = [store.keep(bundle, 7) for _ in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths if path is not None)
    assert [read(path).fault for path in paths if path is not None] == [fault, fault]
    assert not store.due(fault, None)
    assert store.due(fault, Finding("non_finite_input", 0.9))
