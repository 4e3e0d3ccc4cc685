"""Loggers that keep files get the page of a run at the end of a fit."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard import NaNGuard
from tests.helpers import MemoryLogger, batches, fit, folder_of, task, with_bad

pytest.importorskip("matplotlib")


class MLFlowLogger(MemoryLogger):
    """Has the name of MLflow's logger and takes no file."""

    run_id = "7"

    @property
    def experiment(self) -> Any:
        return self

    def log_text(self, *args: Any) -> None:
        raise AttributeError("unused")

    def log_artifact(self, *args: Any) -> None:
        raise OSError("no room")


def test_only_where_there_is_something_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A healthy run makes no page; a logger that does not take one is named, and the run ends as it would."""
    healthy = NaNGuard()
    fit(task(), batches(count=4), healthy, folder=tmp_path / "healthy", logger=MLFlowLogger())
    assert not (folder_of(healthy) / "report.html").exists()
    guard = NaNGuard()
    with caplog.at_level(logging.WARNING):
        run = fit(task(), with_bad(4, count=8), guard, folder=tmp_path / "bad", logger=MLFlowLogger())
    assert run.trainer.global_step == 8
    assert "Saved: 1 intervention." in (folder_of(guard) / "report.html").read_text(encoding="utf-8")
    assert "MLFlowLogger did not accept the page of the run: no room" in caplog.text


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without matplotlib there is no page, and the log says how to get one."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    guard = NaNGuard()
    with caplog.at_level(logging.INFO):
        fit(task(), with_bad(4, count=8), guard, folder=tmp_path, logger=MLFlowLogger())
    assert not (folder_of(guard) / "report.html").exists()
    assert "the loggers get no page of the run. Reports and plots need matplotlib" in caplog.text


@pytest.mark.filterwarnings("ignore")  # those of the packages that MLflow is built on
def test_mlflow(tmp_path: Path) -> None:
    """MLflow has the page beside the words of the interventions."""
    pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger as Logger

    store, artifacts = f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "artifacts").as_uri()
    logger = Logger("nanguard", tracking_uri=store, artifact_location=artifacts)
    fit(task(), with_bad(4, count=8), NaNGuard(), folder=tmp_path, logger=logger)
    kept = [one.path for one in logger.experiment.list_artifacts(logger.run_id, "nanguard")]
    assert sorted(kept) == ["nanguard/interventions.txt", "nanguard/report.html"]


@pytest.mark.skipif(sys.platform == "win32", reason="W&B's service is tried on Linux")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B takes the page as an artifact of the run."""
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="nanguard", save_dir=str(tmp_path), offline=True)
    given: list[Any] = []
    log_artifact = logger.experiment.log_artifact
    monkeypatch.setattr(logger.experiment, "log_artifact", lambda one: (given.append(one), log_artifact(one)))
    guard = NaNGuard()
    fit(task(), with_bad(4, count=8), guard, folder=tmp_path, logger=logger)
    (artifact,) = [one for one in given if one.type == "report"]  # W&B keeps tables as artifacts, too
    assert artifact.name.partition(":")[0] == f"nanguard-report-{guard.run_id}"
    assert "report.html" in artifact.manifest.entries
    wandb.finish()
