"""A fault that is read late and is gone when its update is made again costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.measure.readings import PendingReading
from tests.helpers import batches, differences, with_last_rows, with_nan, words
from tests.trainer.faulty_steps import Fault, train

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "held back": partial(AdamW, lr=0.01, fused=True),
    "made": partial(AdamW, lr=0.01),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, fused=True),
}
DATA = batches(count=16)


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings arrive as late as they may, as from a device that is far behind."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)


@cache
def twin(optimizer: str, accumulated: int, folder: Path) -> dict[str, Any]:
    """What is left of the run without a fault and without a guard."""
    made = OPTIMIZERS[optimizer]
    return train(None, folder, optimizer=made, data=DATA, accumulate_grad_batches=accumulated)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs to compare with lie."""
    return tmp_path_factory.mktemp("twins")


def others(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Differences but for what callbacks and loggers were given before the reading arrived."""
    found = differences(with_last_rows(left), with_last_rows(right))
    return [one for one in found if not (one.startswith("/losses") or one.split(":")[0].endswith("/loss_step"))]


@pytest.mark.parametrize("kind", ["loss", "activation", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_late_fault_that_is_gone(optimizer: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """Weights, moments, buffers, attributes, random streams, progress, metrics and epoch means are bit for bit those of
    the run without it, whether the device held the update back or it was made, early and in the second epoch."""
    fault = Fault(kind, (9, 20))
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred")
    left, _ = train(fault, tmp_path, guard=guard, optimizer=OPTIMIZERS[optimizer], data=DATA)
    assert fault.hits == 2
    assert words(guard)[0] == ("restore", "redo")
    assert {one.cause for one in guard.interventions} == {"transient"}
    assert [(one.global_step, one.batch_idx, one.updates_lost) for one in guard.interventions] == [
        (10, 9, 0),
        (21, 4, 0),
    ]
    assert guard.non_finite_rate == 0.0
    assert others(left, twin(optimizer, 1, folder)) == []


def test_a_late_fault_in_a_window(folder: Path, tmp_path: Path) -> None:
    """A window of accumulation is made again as a whole."""
    guard = NaNGuard(snapshot_every_n_steps=2, readback="deferred")
    options: dict[str, Any] = {"optimizer": OPTIMIZERS["held back"], "accumulate_grad_batches": 2}
    left, _ = train(Fault("gradient", (21,)), tmp_path, guard=guard, data=DATA, **options)
    assert words(guard) == [("restore", "redo")]
    assert others(left, twin("held back", 2, folder)) == []


def test_a_bad_batch_is_skipped_as_before(tmp_path: Path) -> None:
    """A fault that comes back costs its batch; to see that, only its own update is made again."""
    data = [with_nan(one) if index == 9 else one for index, one in enumerate(DATA)]
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred")
    _, run = train(None, tmp_path, guard=guard, optimizer=OPTIMIZERS["held back"], data=data, max_epochs=1)
    assert words(guard) == [("skip",)]
    assert guard.non_finite_rate == 1 / 16
    assert all(bool(torch.isfinite(one).all()) for one in run.module.state_dict().values())


def test_where_a_rollback_is_not_wanted_the_batch_is_skipped(tmp_path: Path) -> None:
    """Without a remedy that restores nothing is made again."""
    guard = NaNGuard(remedies=[], snapshot_every_n_steps=3, readback="deferred")
    train(Fault("loss", (9,)), tmp_path, guard=guard, optimizer=OPTIMIZERS["held back"], data=DATA)
    assert words(guard) == [("skip",)]
