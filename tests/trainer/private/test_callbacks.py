"""The other callbacks: the guard comes before them, and their averaged copies of the module are rewound with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

from lightning_nanguard import NaNGuard
from tests.helpers import (
    copied,
    differences,
    learner_of,
    non_finite,
    words,
)
from tests.modules import NaNWeight
from tests.scenarios.companions import (
    BAD_WEIGHT,
    EMAS,
    DictEMA,
    averages_of,
    averaging,
    train,
)

pytestmark = [
    # Lightning's own advice and notes about what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.usefixtures("own_folder"),
]


@pytest.mark.parametrize("name", sorted(EMAS))
def test_averages_are_rewound_bitwise(name: str) -> None:
    """A restore takes a user's average back to where it stood when the snapshot was taken."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    ema = EMAS[name]()
    before: dict[int, Any] = {}
    restored: dict[str, Any] = {}

    class Look(Callback):
        """Listed before the average and after the guard: sees what a snapshot and a restore see."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            before[trainer.global_step] = copied(averages_of(ema))
            if guard.interventions and not restored:
                restored.update(copied(averages_of(ema)))

    train([Look(), ema], guard, faults=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore",)]
    step = guard.interventions[0].snapshot_step
    assert step is not None
    if step > 0:
        assert differences(before[step], restored) == []


@averaging
def test_weight_averaging_is_rewound_and_goes_on() -> None:
    """Lightning's own average is finite after a restore, and goes on following the weights."""
    average = stock.EMAWeightAveraging(decay=0.5)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train([average], guard, faults=[NaNWeight(5)])
    assert words(guard) == [("restore",)]
    # On train end the average is what the module holds.
    assert non_finite(dict(run.module.named_parameters())) == []


@averaging
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_snapshots_hold_no_average_swapped_in_for_validation(first: bool) -> None:
    """A validation that swaps the average in does not bring it into what a restore puts back."""
    average = stock.WeightAveraging()
    guard = NaNGuard(snapshot_every_n_steps=1)
    after: dict[int, Any] = {}
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if guard.interventions and not seen:
                seen.append(copied(dict(pl_module.named_parameters())))
            after[trainer.global_step] = copied(dict(pl_module.named_parameters()))

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            # The validation loss of a lost weight is NaN, and the guard looks into it at once.
            if guard.interventions and not seen:
                seen.append(copied(dict(pl_module.named_parameters())))

    train([Look(), average], guard, faults=[NaNWeight(BAD_WEIGHT)], first=first, val_check_interval=1)
    step = guard.interventions[0].snapshot_step
    assert step is not None
    assert differences(after[step], seen[0]) == []


@pytest.mark.parametrize("after", [10, 11, 15, 20, 21, 25])
def test_swa_with_a_weight_lost(after: int) -> None:
    """A weight lost before, at, or after the start of SWA reaches neither the average nor the weights at the end."""
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train([swa], guard, faults=[NaNWeight(after)], norm=True)
    assert [i.remedies for i in guard.interventions] == [("restore",)]
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert non_finite(averages_of(swa)) == []


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_order(first: bool, tmp_path: Path) -> None:
    """The guard comes before every other callback, and the rest keep their order."""
    others: list[Callback] = [EarlyStopping("val_loss"), LearningRateMonitor("step"), DictEMA(), Timer("00:01:00:00")]
    guard = NaNGuard()
    run = train([*others, ModelCheckpoint(tmp_path)], guard, first=first, max_epochs=1)
    listed = run.trainer.callbacks
    assert listed[0] is guard
    assert [c for c in listed if c in others] == others
    assert isinstance(listed[-1], ModelCheckpoint)
    assert listed.count(guard) == 1
