"""LearningRateMonitor logs effective rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback
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
    """Keeps what LearningRateMonitor logs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.seen += [float(value) for key, value in metrics.items() if key.startswith("lr-")]


@pytest.mark.parametrize("order", ["guard first", "monitor first"])
@pytest.mark.parametrize("name", ["none", "exponential", "cosine"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("logging_interval", ["step", "epoch", None])
def test_learning_rate_monitor(name: str, interval: str, logging_interval: Any, order: str, tmp_path: Path) -> None:
    """LearningRateMonitor logs the effective rate, and its looking changes nothing."""
    bare_logger, logger = MemoryLogger(tmp_path), MemoryLogger(tmp_path)
    bare = train(Tiny(SCHEDULERS[name], interval), LearningRateMonitor(logging_interval), logger=bare_logger)

    guard, monitor = RateGuard({0: 0.5}), LearningRateMonitor(logging_interval)
    callbacks = [guard, monitor] if order == "guard first" else [monitor, guard]
    guarded = train(Tiny(SCHEDULERS[name], interval), *callbacks, logger=logger)

    # The guard acts inside the first step, after what is logged at the start of its epoch and of its batch.
    # Without an interval of its own, the monitor logs at the scheduler's, and at both where there is no scheduler.
    intervals = {logging_interval} if logging_interval else {interval} if name != "none" else {"step", "epoch"}
    before = len(GROUP_RATES) * len(intervals)
    assert logger.seen == bare_logger.seen[:before] + [rate * 0.5 for rate in bare_logger.seen[before:]]
    assert len(logger.seen) > before
    assert_same_clock(guarded, bare)
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(monitor))


# The monitors


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
