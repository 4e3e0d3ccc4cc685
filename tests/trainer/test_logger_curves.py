"""Loggers get the curves of the guard, the words of interventions and the settings, at Lightning's own steps."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_nanguard import NaNGuard
from tests.helpers import MemoryLogger, batches, fit, task, with_bad


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


def test_tensorboard_and_csv(tmp_path: Path) -> None:
    """Both have curves and settings; TensorBoard has the words of interventions, the first of a kind in full."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv", "0"), TensorBoardLogger(str(tmp_path), "tb", "0")]
    fit(task(), with_bad(4, 8, 12, count=16), NaNGuard(max_snapshots=2), logger=loggers)
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        norms = [row["nanguard/grad_norm"] for row in csv.DictReader(file) if row.get("nanguard/grad_norm")]
    assert len(norms) == 16 - 3
    events = EventAccumulator(str(tmp_path / "tb" / "0"))
    events.Reload()
    assert [event.value for event in events.Scalars("nanguard/grad_norm")] == pytest.approx(list(map(float, norms)))
    assert "hp_metric" not in events.Tags()["scalars"]
    texts = [
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("nanguard/interventions/text_summary")
    ]
    assert len(texts) == 2
    assert "done: skipped the batch" in texts[0]
    assert texts[1].endswith("(2 so far)")
    for folder in ("csv", "tb"):
        settings = yaml.safe_load((tmp_path / folder / "0" / "hparams.yaml").read_text(encoding="utf-8"))
        assert settings["nanguard/max_snapshots"] == 2
        assert settings["nanguard/remedies"] == "Rollback, ClipGradients, ReduceLR"


def test_a_logger_that_takes_no_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, and the log names the logger; one that does not take the curves gets no more of them."""

    class Refusing(MemoryLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if "nanguard/lr" in metrics:
                raise ValueError("no slashes")
            super().log_metrics(metrics, step)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no room")

    with caplog.at_level(logging.WARNING):
        run = fit(task(), batches(count=4), NaNGuard(), folder=tmp_path, logger=Refusing())
    assert run.trainer.global_step == 4
    assert "Refusing did not take the guard's settings: no room" in caplog.text
    assert caplog.text.count("Refusing did not take nanguard/grad_norm, nanguard/lr") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="W&B's service is tried on Linux")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B has the curves, the settings, and a table of the words."""
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="nanguard", save_dir=str(tmp_path), offline=True)
    fit(task(), with_bad(4, count=8), NaNGuard(), folder=tmp_path, logger=logger)
    summary = dict(logger.experiment.summary)
    assert summary["nanguard/lr"] == 0.01
    assert "nanguard/interventions_told" in summary
    assert logger.experiment.config["nanguard/act_on"] == "certain"
    wandb.finish()
