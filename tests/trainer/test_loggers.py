"""What loggers get: settings, numbers after each intervention, words, curves, and the page of a run."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_nanguard import NaNGuard
from lightning_nanguard.record.run_log import read_run
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.trainer.loggers import begun_with
from tests.helpers import ONCE, MemoryLogger, batches, fit, folder_of, task, with_bad
from tests.modules import Diverge

TWICE = with_bad(4, 8, 12, count=16)
"""Three bad batches, of which the first and the second are told."""


# -------------------------------------------------------------------------------------------------- settings


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


# --------------------------------------------------------------------------------------------------- numbers


def test_only_what_is_known_is_logged() -> None:
    """Without a clipping value none is logged."""
    logger = MemoryLogger()
    fit(task(), with_bad(4), NaNGuard(), logger=logger)
    rows = [row for _, row in logger.rows if "nanguard/interventions" in row]
    assert rows == [{"nanguard/interventions": 1.0, "nanguard/lr_multiplier": 1.0}]


def test_numbers_in_the_loggers(tmp_path: Path) -> None:
    """CSVLogger and TensorBoardLogger get the count, the multiplier, and the clipping value once there is one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(str(tmp_path), "tb", "0")]
    guard = NaNGuard(snapshot_every_n_steps=2, thresholds=ONCE)
    # A batch is skipped and, before that, the learner slowed and clipped.
    fit(task(), with_bad(20), guard, logger=loggers, callbacks=[Diverge(7, 10)])
    assert guard.lr_multiplier < 1.0
    counts = [float(number + 1) for number in range(len(guard.interventions))]
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("nanguard/interventions")]
    assert [float(row["nanguard/interventions"]) for row in rows] == counts
    assert float(rows[-1]["nanguard/lr_multiplier"]) == pytest.approx(guard.lr_multiplier)
    assert float(rows[-1]["nanguard/clip_val"]) > 0
    events = EventAccumulator(str(tmp_path / "tb" / "0"))
    events.Reload()
    assert [event.value for event in events.Scalars("nanguard/interventions")] == counts
    assert events.Scalars("nanguard/lr_multiplier")[-1].value == pytest.approx(guard.lr_multiplier)


def curve(logger: MemoryLogger, name: str) -> list[int | None]:
    return [step for step, row in logger.rows if name in row]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}], ids=str)
def test_curves_at_lightnings_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    """A healthy run has a point of each curve where Lightning logs the loss, once each."""
    logger = MemoryLogger()
    fit(task(), batches(count=12), NaNGuard(), folder=tmp_path, logger=logger, **options)
    losses = curve(logger, "loss_step")
    assert losses
    assert curve(logger, "nanguard/grad_norm") == curve(logger, "nanguard/lr") == losses
    assert {row["nanguard/lr"] for _, row in logger.rows if "nanguard/lr" in row} == {0.01}


def test_each_optimizer_has_its_curve(tmp_path: Path) -> None:
    """Under manual optimization the second optimizer's values have its number."""
    logger = MemoryLogger()
    fit(task("manual"), batches(count=6), NaNGuard(), folder=tmp_path, logger=logger)
    assert curve(logger, "nanguard/grad_norm_1") == curve(logger, "nanguard/grad_norm") != []


class Refusing(MemoryLogger):
    """A logger that does not take the guard's curves."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "nanguard/lr" in metrics:
            raise ValueError("no slashes")
        super().log_metrics(metrics, step)


def test_a_logger_that_takes_no_curves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, and the log names the logger, which gets no more of them."""
    with caplog.at_level(logging.WARNING):
        run = fit(task(), batches(count=4), NaNGuard(), folder=tmp_path, logger=Refusing())
    assert run.trainer.global_step == 4
    assert caplog.text.count("Refusing did not accept nanguard/grad_norm, nanguard/lr") == 1


def test_csv(tmp_path: Path) -> None:
    """A CSV file has the norm of every healthy update."""
    fit(task(), with_bad(4, 8, 12, count=16), NaNGuard(), logger=CSVLogger(tmp_path, "csv", "0"))
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        norms = [float(row["nanguard/grad_norm"]) for row in csv.DictReader(file) if row.get("nanguard/grad_norm")]
    assert len(norms) == 16 - 3
    assert all(norm > 0 for norm in norms)


# ------------------------------------------------------------------------------------------ words and pages


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
    pytest.importorskip("matplotlib")
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


@pytest.mark.skipif(sys.platform == "win32", reason="W&B's service is tried on Linux")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B has the curves, the settings, a table of the words, and the page as an artifact of the run."""
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="nanguard", save_dir=str(tmp_path), offline=True)
    given: list[Any] = []
    log_artifact = logger.experiment.log_artifact
    monkeypatch.setattr(logger.experiment, "log_artifact", lambda one: (given.append(one), log_artifact(one)))
    guard = NaNGuard()
    fit(task(), TWICE, guard, folder=tmp_path, logger=logger)
    summary = dict(logger.experiment.summary)
    assert summary["nanguard/lr"] == 0.01
    assert summary["nanguard/interventions_told"]["nrows"] == 2
    assert logger.experiment.config["nanguard/act_on"] == "certain"
    (artifact,) = [one for one in given if one.type == "report"]  # W&B keeps tables as artifacts, too
    assert artifact.name.partition(":")[0] == f"nanguard-report-{guard.run_id}"
    assert "report.html" in artifact.manifest.entries
    wandb.finish()


@pytest.mark.filterwarnings("ignore")  # those of the packages that MLflow is built on
def test_mlflow(tmp_path: Path) -> None:
    """MLflow has the curves, the settings, a text with the words of all that was told, and the page."""
    pytest.importorskip("mlflow")
    pytest.importorskip("matplotlib")
    from pytorch_lightning.loggers import MLFlowLogger as Logger

    store, artifacts = f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "artifacts").as_uri()
    logger = Logger("nanguard", tracking_uri=store, artifact_location=artifacts)
    fit(task(), TWICE, NaNGuard(), folder=tmp_path, logger=logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params["nanguard/act_on"] == "certain"
    assert run.data.metrics["nanguard/lr"] == 0.01
    kept = [one.path for one in logger.experiment.list_artifacts(logger.run_id, "nanguard")]
    assert sorted(kept) == ["nanguard/interventions.txt", "nanguard/report.html"]
    (file,) = (tmp_path / "artifacts").rglob("nanguard/interventions.txt")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert "  done: skipped the batch" in lines
    assert lines[-1].endswith("(2 so far)")
