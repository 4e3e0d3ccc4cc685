"""fp16: overflows are the scaler's business, until no scale cures them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch.optim import AdamW

from lightning_nanguard import NaNGuard, NonFinite, TrainingDivergedError
from tests.helpers import (
    FaultAt,
    Run,
    batches,
    differences,
    fit,
    learner_of,
    non_finite,
    state_of,
    with_bad,
)
from tests.modules import make

pytestmark = pytest.mark.usefixtures("own_folder")

BAD_BATCH = 9


def adam(**options: Any) -> Callable[..., AdamW]:
    return lambda parameters: AdamW(parameters, lr=options.pop("lr", 0.01), **options)


def assert_alive(run: Run) -> None:
    """Nothing of the learner is lost, and it has gone on learning after the last intervention."""
    assert non_finite(learner_of(run.trainer, run.module)) == []


class Scale(Callback):
    """The loss scale after every batch."""

    def __init__(self) -> None:
        self.after: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.after.append(float(trainer.precision_plugin.scaler.get_scale()))


def scaled(init_scale: float, growth_interval: int = 1000) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("fused", [False, True])
def test_ordinary_overflows(fused: bool) -> None:
    """Overflows while the scaler looks for its scale are its own business: no intervention, the same bits."""
    build = make(optimizer=adam(fused=fused))
    scale = Scale()
    guard = NaNGuard()
    guarded = fit(build(), batches(count=24), guard, callbacks=[scale], **scaled(2.0**28))
    assert scale.after[0] < 2.0**28, "no overflow happened, so nothing was tested"
    assert list(guard.interventions) == []
    bare = fit(build(), batches(count=24), callbacks=[Scale()], **scaled(2.0**28))
    assert differences(state_of(bare), state_of(guarded)) == []


@pytest.mark.parametrize("fused", [False, True])
def test_streak_of_overflows(fused: bool) -> None:
    """Overflow upon overflow that no scale cures is the learner's fault, and the scale never goes up for it."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    scale = Scale()
    hits = FaultAt("gradient", math.inf, range(12, 34))
    done = fit(
        make(optimizer=adam(fused=fused))(),
        batches(count=48),
        guard,
        callbacks=[hits, scale],
        **scaled(2.0**26, growth_interval=4),
    )
    assert {i.fault for i in guard.interventions} == {"loss_scale_collapse"}
    assert "restore" in guard.interventions[0].remedies
    after = scale.after[12:34]
    assert all(now <= before for before, now in pairwise(after)), after
    assert_alive(done)


def test_scale_at_its_floor() -> None:
    """An overflow at a small scale is the scaler's, unless the user has set a lower limit."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(make()(), batches(count=24), guard, callbacks=[FaultAt("gradient", math.inf, 10)], **scaled(0.5))
    assert guard.interventions == []
    guard = NaNGuard([NonFinite(min_loss_scale=1.0)], snapshot_every_n_steps=2)
    fit(make()(), batches(count=24), guard, callbacks=[FaultAt("gradient", math.inf, 10)], **scaled(0.5))
    assert [i.fault for i in guard.interventions] == ["loss_scale_collapse"]


def test_overflow_that_never_ends() -> None:
    """A learner whose gradient overflows at every scale ends the run, in a bounded number of steps."""
    guard = NaNGuard()
    with pytest.raises(TrainingDivergedError, match="loss_scale_collapse"):
        fit(
            make()(),
            batches(count=24),
            guard,
            callbacks=[FaultAt("gradient", math.inf, range(10, 10_000))],
            max_epochs=100,
            **scaled(1024.0),
        )


def test_nan_loss_under_a_scaler() -> None:
    """A loss that is NaN is no overflow: it is on record, and the scale is left where the scaler puts it."""
    guard = NaNGuard()
    done = fit(make()(), with_bad(BAD_BATCH), guard, precision="16-mixed")
    assert [i.fault for i in guard.interventions] == ["non_finite_loss"]
    assert_alive(done)


class SpoilScale(Callback):
    """Puts a number into the scale before a batch."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BAD_BATCH:
            trainer.precision_plugin.scaler._scale.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_scale_that_no_scaler_has_grown_to(value: float) -> None:
    """It is late or never right again by itself, so the last good one comes back. Only the update of this batch is left
    out, because a GradScaler skips all updates with such a scale."""
    guard, scale = NaNGuard(snapshot_every_n_steps=3), Scale()
    run = fit(make(optimizer=adam())(), batches(count=24), guard, callbacks=[SpoilScale(value), scale], **scaled(64.0))
    assert [(one.fault, one.place, one.remedies) for one in guard.interventions] == [
        ("corrupted_state", "scale of the GradScaler", ("restore scale",))
    ]
    assert guard.interventions[0].updates_lost == 0
    assert scale.after[BAD_BATCH:] == [64.0] * (24 - BAD_BATCH)
    data = batches(count=24)
    without = fit(make(optimizer=adam())(), data[:BAD_BATCH] + data[BAD_BATCH + 1 :], **scaled(64.0))
    assert differences(dict(run.module.named_parameters()), dict(without.module.named_parameters())) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [-64.0, 0.0])
def test_a_scale_without_a_meaning_is_no_error(value: float, fused: bool) -> None:
    """A run that ends without the guard ends with it, whatever has become of the scale."""
    spoil = SpoilScale(value)
    run = fit(make(optimizer=adam(fused=fused))(), batches(count=14), NaNGuard(), callbacks=[spoil], **scaled(64.0))
    assert run.trainer.global_step == 14
    assert_alive(run)
