"""The rows that Lightning gives the loggers after an update, read and given again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_nanguard.trainer.private.logged_rows import LoggedRow, log_row, row_of_step
from lightning_nanguard.trainer.private.packages import logged_at
from tests.helpers import Batch, MemoryLogger, Task, batches, fit, mlp


class Logs(Task):
    """Logs numbers, tensors and a metric, from its step and from a hook; ``named`` replaces the loggers' step."""

    def __init__(self, named: bool) -> None:
        super().__init__(mlp())
        self.metric, self.named = MeanMetric(), named

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch, "loss")
        self.metric(loss.detach())
        self.log("mean", self.metric, on_step=True, on_epoch=True)
        self.log("index", float(batch_idx))
        self.log("of the epoch", loss, on_step=False, on_epoch=True)
        if self.named:
            self.log("step", float(100 + self.global_step))
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("of a hook", 1.0)


class LogsAgain(Callback):
    """Gives a second logger what is read after each step."""

    def __init__(self) -> None:
        self.second = MemoryLogger()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        row = row_of_step(trainer, logged_at(trainer), trainer.current_epoch)
        if row is not None and not trainer.fit_loop._should_accumulate():
            first, trainer._loggers = trainer._loggers, [self.second]
            log_row(trainer, row)
            trainer._loggers = first


@pytest.mark.parametrize("named", [False, True], ids=["usual", "step"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}], ids=str)
def test_a_row_is_lightnings_own(options: dict[str, Any], named: bool, tmp_path: Path) -> None:
    """Steps, names, epochs and values are those that Lightning logs, but for values that hooks have logged."""
    again, logger = LogsAgain(), MemoryLogger()
    fit(Logs(named), batches(count=6), folder=tmp_path, logger=logger, callbacks=[again], max_epochs=2, **options)
    own = [(step, {name: value for name, value in row.items() if name != "of a hook"}) for step, row in logger.rows]
    assert again.second.rows == [(step, row) for step, row in own if "index" in row]
    assert len(again.second.rows) == 12 // options.get("accumulate_grad_batches", options.get("log_every_n_steps", 1))


class Refuses(MemoryLogger):
    """A logger that takes each step once."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        raise ValueError(f"there is a row of step {step}")


def test_a_logger_that_takes_no_row_again(caplog: pytest.LogCaptureFixture) -> None:
    """It is named in a warning, and the other loggers get the row."""

    class Trains:
        loggers = (Refuses(), MemoryLogger())

    trainer: Any = Trains()
    with caplog.at_level(logging.WARNING):
        log_row(trainer, LoggedRow({"loss": 0.5}, 7, 1))
    assert caplog.messages == [
        "NaNGuard: Refuses did not take the row of step 7 again: ValueError: there is a row of step 7"
    ]
    assert trainer.loggers[1].rows == [(7, {"loss": 0.5, "epoch": 1})]
