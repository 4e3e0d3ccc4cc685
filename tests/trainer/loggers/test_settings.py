"""The settings of a guard are among the hyperparameters of every logger, and in the log of the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_nanguard import NaNGuard
from lightning_nanguard.record.run_log import read_run
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.trainer.loggers.settings import begun_with
from tests.helpers import MemoryLogger, batches, fit, folder_of, task


def test_hyperparameters_of_loggers(tmp_path: Path) -> None:
    """TensorBoard and CSV files have the settings that are not the defaults, and those that say most."""
    pytest.importorskip("tensorboard")
    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(str(tmp_path), "tb", "0")]
    guard = NaNGuard(max_snapshots=2)
    fit(task(), batches(count=4), guard, logger=loggers)
    for folder in ("csv", "tb"):
        settings = yaml.safe_load((tmp_path / folder / "0" / "hparams.yaml").read_text(encoding="utf-8"))
        assert settings["nanguard/max_snapshots"] == 2
        assert settings["nanguard/remedies"] == "Rollback, ClipGradients, ReduceLR"
    log = read_run(folder_of(guard))
    assert log is not None
    assert log.fits[0]["settings"]["max_snapshots"] == 2


def test_a_logger_that_takes_no_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, and the log names the logger."""

    class Refusing(MemoryLogger):
        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no room")

    with caplog.at_level(logging.WARNING):
        run = fit(task(), batches(count=4), NaNGuard(), folder=tmp_path, logger=Refusing())
    assert run.trainer.global_step == 4
    assert "Refusing did not accept the guard's settings: no room" in caplog.text


def test_what_a_fit_is_begun_with() -> None:
    """The log of the run takes numbers and short words of module and data module, and nothing that is long or odd."""

    class Model(LightningModule):
        def __init__(self, lr: float = 0.1, name: str = "x" * 99, layers: tuple[int, ...] = (1,)) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Data(LightningDataModule):
        def __init__(self, batch_size: int = 8, shuffle: bool = True) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Trainer:
        datamodule = Data()

    few = RecordsThresholds(hyperparameters_per_run=2, characters_per_hyperparameter=20)
    begun = begun_with(Trainer(), Model(), {"rules": ["a", "b"], "budget": object()}, few)  # type: ignore[arg-type]
    assert begun["hyperparameters"] == {"lr": 0.1, "batch_size": 8}
    assert begun["settings"] == {"rules": "a, b", "budget": "object"}
