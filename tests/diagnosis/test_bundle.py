"""An incident is written without pickle and read back, and a run keeps a bounded number of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard import Fault, Finding, NaNGuard
from lightning_nanguard.diagnosis import bundle as bundles
from lightning_nanguard.diagnosis.bundle import Bundle, BundleStore, name_of_class, read
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.thresholds.diagnosis import BundleThresholds
from lightning_nanguard.types import Comparison, Evidence
from tests.classifier import Model, Numbers
from tests.helpers import FaultAt, differences, trainer_for

NAN = math.nan

BATCHES: list[Any] = [
    (torch.randn(3, 2), torch.arange(3)),
    {"image": torch.randn(2, 2).t(), 7: [torch.tensor(1.5), None, True, "word", 3], "far": math.inf},
    [torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bfloat16), (), {}, torch.zeros(0, 3)],
    torch.randn(4)[::2],
]


@pytest.mark.parametrize("batch", BATCHES, ids=["tuple", "dict", "list", "tensor"])
def test_batches_come_back_as_they_were(batch: Any, tmp_path: Path) -> None:
    """Nested batches survive the folder bit for bit, and nothing in it is a pickle."""
    evidence = Evidence(3, comparison=Comparison(NAN, 1.0), levels=(1.0, None), usual_norm=math.inf)
    written = Bundle(
        module="m:C",
        hparams={"a": 1, "b": nn.ReLU()},
        fault=Fault("non_finite_loss", "batch", "loss", NAN),
        evidence=evidence,
        finding=None,
        batches=[MicroBatch(3, 2, batch, (torch.get_rng_state(),))],
        state={"w": torch.randn(3)},
    )
    (tmp_path / "one").mkdir()
    bundles.write(written, tmp_path / "one")
    again = read(tmp_path / "one")
    assert differences(batch, again.batches[0].batch) == []
    assert differences(written.batches[0].random, again.batches[0].random) == []
    assert differences(dict(written.state), dict(again.state)) == []
    assert repr(again.evidence) == repr(evidence)
    assert repr(again.fault) == repr(written.fault)
    assert again.hparams == {"a": 1}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["bundle.json", "tensors.safetensors"]
    json.loads((tmp_path / "one" / "bundle.json").read_text())


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    """A part of the batch that JSON does not know is left out and named; the run goes on."""
    keeper = BundleStore(tmp_path / "all", BundleThresholds(max_bundles=2, max_per_kind=1))
    fault = Fault("non_finite_loss", "batch", "loss")
    odd = Bundle("m:C", {}, fault, Evidence(1), None, [MicroBatch(1, 0, (torch.zeros(2), object()), ())], {})
    path = keeper.keep(odd, 7)
    assert path is not None
    assert read(path).missing == ["batch/0/1 (builtins.object)"]
    assert not keeper.due(fault, None)
    assert keeper.due(Fault("gradient_spike", "batch", "gradient"), None)


def test_the_class_of_a_script_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script defines can be imported by its file or its module elsewhere, and never from __main__."""
    main = ModuleType("__main__")
    kind = type("Model", (), {"__module__": "__main__"})
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(tmp_path)
    assert name_of_class(Bundle) == "lightning_nanguard.diagnosis.bundle:Bundle"
    assert name_of_class(kind) == "__main__:Model"  # of a notebook
    for file, name in ((tmp_path / "runs" / "my.py", "runs/my.py"), (tmp_path.parent / "my.py", "")):
        main.__file__ = str(file)
        assert name_of_class(kind) == f"{name or file}:Model"
    main.__spec__ = SimpleNamespace(name="package.train")  # type: ignore[assignment]
    assert name_of_class(kind) == "package.train:Model"


pytest.importorskip("safetensors")


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
