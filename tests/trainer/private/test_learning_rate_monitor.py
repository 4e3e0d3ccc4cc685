"""LearningRateMonitor logs effective rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from lightning_nanguard.trainer.private.learning_rate_monitor import around_learning_rate_monitors
from tests.act.rates import (
    GROUP_RATES,
    SCHEDULERS,
    RateGuard,
    Tiny,
    assert_same_clock,
    train,
)


class MemoryLogger(CSVLogger):
    """Keeps the rates that LearningRateMonitors log."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.seen += [float(value) for key, value in metrics.items() if key.startswith("lr-")]


INTERVALS = ("step", "epoch", None)


def monitored(name: str, interval: str, root: Path, *guards: Callback) -> tuple[Trainer, list[LearningRateMonitor]]:
    """Train with a monitor of every logging interval before the guard and behind it."""
    monitors = [LearningRateMonitor(logging_interval) for logging_interval in INTERVALS * 2]
    logger = MemoryLogger(root)
    callbacks = [*monitors[:3], *guards, *monitors[3:]]
    trainer = train(Tiny(SCHEDULERS[name], interval), *callbacks, logger=logger)
    # A monitor keeps what it logs in `lrs`, by group.
    assert sorted(logger.seen) == sorted(rate for one in monitors for rates in one.lrs.values() for rate in rates)
    return trainer, monitors


@pytest.mark.parametrize("name", ["none", "exponential", "cosine"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor(name: str, interval: str, tmp_path: Path) -> None:
    """LearningRateMonitor logs the effective rate whenever it logs, and its looking changes nothing."""
    bare, bare_monitors = monitored(name, interval, tmp_path)
    guarded, monitors = monitored(name, interval, tmp_path, RateGuard({0: 0.5}))
    for logging_interval, seen, before in zip(INTERVALS * 2, monitors, bare_monitors, strict=True):
        # The guard acts inside the first step, after what is logged at the start of its epoch and of its batch.
        # Without an interval of its own, the monitor logs at the scheduler's, and at both where there is no scheduler.
        intervals = {logging_interval} if logging_interval else {interval} if name != "none" else {"step", "epoch"}
        assert len(seen.lrs) == len(GROUP_RATES)
        for group, rates in seen.lrs.items():
            first, later = before.lrs[group][: len(intervals)], before.lrs[group][len(intervals) :]
            assert rates == first + [rate * 0.5 for rate in later]
            assert later
        assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(seen))
    assert_same_clock(guarded, bare)


class Holder:
    """Stands for a trainer."""

    def __init__(self, *callbacks: Any) -> None:
        self.callbacks = list(callbacks)


def test_around_monitors_is_undone() -> None:
    """Only monitors (subclasses too) are surrounded, also when they raise, and the undo leaves nothing behind."""

    class Raises(LearningRateMonitor):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("no logger")

    calls: list[str] = []
    monitor, other = Raises(), Callback()
    undo = around_learning_rate_monitors(
        Holder(monitor, other), lambda: calls.append("before"), lambda: calls.append("after")
    )
    with pytest.raises(RuntimeError, match="no logger"):
        monitor.on_train_batch_start()
    assert calls == ["before", "after"]
    assert not vars(other)
    undo()
    undo()
    assert "on_train_batch_start" not in vars(monitor)
    assert "on_train_epoch_start" not in vars(monitor)


def test_around_monitors_wrapped_again() -> None:
    """What somebody else has wrapped since stays wrapped, and ours passes through."""
    calls: list[str] = []
    monitor = LearningRateMonitor()
    monitor.on_train_batch_start = lambda: calls.append("monitor")  # type: ignore[method-assign]
    own = monitor.on_train_batch_start
    undo = around_learning_rate_monitors(Holder(monitor), lambda: calls.append("before"), lambda: None)
    surrounded = monitor.on_train_batch_start
    monitor.on_train_batch_start = lambda: surrounded()  # type: ignore[method-assign]
    undo()
    monitor.on_train_batch_start()
    assert calls == ["monitor"]
    monitor.on_train_batch_start = own  # type: ignore[method-assign]
    undo = around_learning_rate_monitors(Holder(monitor), lambda: None, lambda: None)
    undo()
    assert monitor.on_train_batch_start is own
