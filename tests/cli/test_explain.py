"""`nanguard explain` tells the records of a run in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import Intervention, NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.jsonl import JsonLines
from tests.classifier import Model, Numbers
from tests.helpers import trainer_for


def test_explain_tells_records_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard explain` prints every record of a run with its finding, and what the preflight said."""
    guard = NaNGuard(preflight=True, dirpath=tmp_path / "run" / "nanguard")
    trainer = trainer_for(tmp_path, guard, max_epochs=1, limit_val_batches=0)
    trainer.fit(Model("softmax"), Numbers(bad=37))
    assert main(["explain", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step 0 (epoch 0), advice (preflight): non_finite_input in field 0 of the data set (sample 37)" in said
    assert "advice (preflight): double_softmax in training_step (softmax, classifier.py:" in said
    assert "; skipped the batch; cause: non_finite_input in field 0 of the batch (sample " in said
    assert len(said.splitlines()) == 2 + 2 + 1


def test_explain_prints_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard explain` tells the records of a run in words, and says where it found none."""
    sink = JsonLines(tmp_path / "version_0" / "nanguard" / "interventions.jsonl")
    sink.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    sink.write(Intervention(9, 0, 9, "exploding_loss", "loss", ("restore", "scale"), 0.1, 0.05, 4))
    assert main(["explain", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step 7" in shown
    assert "went back to step 4" in shown
    (tmp_path / "empty").mkdir()
    assert main(["explain", str(tmp_path / "empty")]) == 2
    assert "no interventions.jsonl" in capsys.readouterr().err
