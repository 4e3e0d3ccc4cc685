"""Loggers that have text get the words of interventions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_nanguard import NaNGuard
from tests.helpers import fit, task, with_bad

TWICE = with_bad(4, 8, 12, count=16)
"""Three bad batches, of which the first and the second are told."""


def test_tensorboard(tmp_path: Path) -> None:
    """TensorBoard has the first of a kind in full and the second in one line; its curves are those of the updates."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(task(), TWICE, NaNGuard(), logger=TensorBoardLogger(str(tmp_path), "tb", "0"))
    events = EventAccumulator(str(tmp_path / "tb" / "0"))
    events.Reload()
    assert len(events.Scalars("nanguard/grad_norm")) == 16 - 3
    assert "hp_metric" not in events.Tags()["scalars"]
    told = events.Tensors("nanguard/interventions/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in told]
    assert len(texts) == 2
    assert "done: skipped the batch" in texts[0]
    assert texts[1].endswith("(2 so far)")


@pytest.mark.skipif(sys.platform == "win32", reason="W&B's service is tried on Linux")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B has the curves, the settings, and a table of the words."""
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="nanguard", save_dir=str(tmp_path), offline=True)
    fit(task(), TWICE, NaNGuard(), folder=tmp_path, logger=logger)
    summary = dict(logger.experiment.summary)
    assert summary["nanguard/lr"] == 0.01
    assert summary["nanguard/interventions_told"]["nrows"] == 2
    assert logger.experiment.config["nanguard/act_on"] == "certain"
    wandb.finish()


@pytest.mark.filterwarnings("ignore")  # those of the packages that MLflow is built on
def test_mlflow(tmp_path: Path) -> None:
    """MLflow has the curves, the settings, and a text with the words of all that was told."""
    mlflow = pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    store, artifacts = f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "artifacts").as_uri()
    logger = MLFlowLogger("nanguard", tracking_uri=store, artifact_location=artifacts)
    fit(task(), TWICE, NaNGuard(), folder=tmp_path, logger=logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params["nanguard/act_on"] == "certain"
    assert run.data.metrics["nanguard/lr"] == 0.01
    (file,) = (tmp_path / "artifacts").rglob("nanguard/interventions.txt")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert "  done: skipped the batch" in lines
    assert lines[-1].endswith("(2 so far)")
    assert mlflow.__version__
