"""The guard's place among the callbacks, and the rates that a LearningRateMonitor logs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateFinder, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.callbacks import after_every_batch, around_learning_rate_monitors, put_first
from tests.act.rates import (
    GROUP_RATES,
    SCHEDULERS,
    RateGuard,
    Tiny,
    assert_same_clock,
    train,
)
from tests.helpers import batches, fit, task, trainer_for


class Holder:
    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks


class Said(Callback):
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.said.append("callback")


def test_a_function_behind_all_callbacks() -> None:
    """It is called when a batch is over for every callback in the list, and is gone when it is undone."""
    said: list[str] = []
    undos = []

    class Adds(Callback):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            undos.append(after_every_batch(trainer, lambda: said.append("function")))

        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            if undos:
                undos.pop()()

    run = fit(task(), batches(count=2), callbacks=[Adds(), Said(said)], max_epochs=2)
    assert said == ["callback", "function"] * 2 + ["callback"] * 2
    assert [type(one).__name__ for one in run.trainer.callbacks[:2]] == ["Adds", "Said"]
    assert not any(type(one).__name__ == "_LastCallback" for one in run.trainer.callbacks)


def test_the_guard_comes_first_but_for_tuners() -> None:
    """The guard moves ahead of every callback except tuners that stand first; the list itself is not changed."""
    guard, tuner, other = Callback(), LearningRateFinder(), Callback()
    for before, after in (
        ([other, guard], [guard, other]),
        ([tuner, other, guard], [tuner, guard, other]),
        ([other, tuner, guard], [guard, other, tuner]),
    ):
        holder = Holder(list(before))
        given = holder.callbacks
        put_first(holder, guard)
        assert holder.callbacks == after
        assert given == before


def test_the_guard_goes_back_to_its_place() -> None:
    """It stands behind those it stood behind, also where callbacks were added or taken out meanwhile; it is not put
    back where it was taken out itself."""
    guard, tuner, first, last, new = Callback(), LearningRateFinder(), Callback(), Callback(), Callback()
    for before, change, after in (
        ([first, guard, last], lambda now: now, [first, guard, last]),
        ([tuner, first, guard], lambda now: now, [tuner, first, guard]),
        ([first, guard, last], lambda now: [*now, new], [first, guard, last, new]),
        ([first, guard, last], lambda now: [one for one in now if one is not first], [guard, last]),
        ([first, guard, last], lambda now: [one for one in now if one is not guard], [first, last]),
    ):
        holder = Holder(list(before))
        undo = put_first(holder, guard)
        holder.callbacks = change(holder.callbacks)
        undo()
        assert holder.callbacks == after


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_after_a_fit_the_order_is_the_users(fails: bool) -> None:
    """The trainer's callbacks stand as before the fit, also after an exception and after a second fit."""

    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if fails:
                raise KeyError("failed")

    guard = NaNGuard()
    trainer = trainer_for(None, callbacks=[Said([]), Fails(), guard])
    given = list(trainer.callbacks)
    assert given[-1] is guard
    data = torch.utils.data.DataLoader(batches(count=2), batch_size=None)
    for _ in range(2):
        with pytest.raises(KeyError, match="failed") if fails else nullcontext():
            trainer.fit(task(), data, data)
        assert trainer.callbacks == given


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


def test_around_monitors_is_undone() -> None:
    """Only monitors (subclasses too) are surrounded, also when they raise, and the undo leaves nothing behind."""

    class Raises(LearningRateMonitor):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("no logger")

    calls: list[str] = []
    monitor, other = Raises(), Callback()
    undo = around_learning_rate_monitors(
        Holder([monitor, other]), lambda: calls.append("before"), lambda: calls.append("after")
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
    undo = around_learning_rate_monitors(Holder([monitor]), lambda: calls.append("before"), lambda: None)
    surrounded = monitor.on_train_batch_start
    monitor.on_train_batch_start = lambda: surrounded()  # type: ignore[method-assign]
    undo()
    monitor.on_train_batch_start()
    assert calls == ["monitor"]
    monitor.on_train_batch_start = own  # type: ignore[method-assign]
    undo = around_learning_rate_monitors(Holder([monitor]), lambda: None, lambda: None)
    undo()
    assert monitor.on_train_batch_start is own
