"""With every scheduler a run that is resumed, in mid-epoch and at an epoch's end, uses the rates of one not stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, ReduceLR, Rollback
from tests.act.rates import BATCHES, EPOCHS, SCHEDULERS
from tests.helpers import ONCE, Positioned, batches, differences, learner_of, task, trainer_for
from tests.modules import Diverge, SaveAt

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("own_folder"),
]

# Twice: after the first time a rate that its schedule has lowered since is not cut.
BLOWN_UP_AFTER = (3, 4)
FOURTEEN = [name for name in SCHEDULERS if name not in ("none", "own", "duck")]
STEPS = BATCHES * EPOCHS


class Used(Callback):
    """The effective rates after each update, by ``global_step``, as the guard gives them to the optimizer."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}
        self.multipliers: dict[int, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guard = next(c for c in trainer.callbacks if isinstance(c, NaNGuard))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        scheduled = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.rates[trainer.global_step] = [float(rate) * self.guard.lr_multiplier for rate in scheduled]
        self.multipliers[trainer.global_step] = self.guard.lr_multiplier


def groups(parameters: list[Any]) -> Optimizer:
    half = len(parameters) // 2
    return SGD([{"params": parameters[:half], "lr": 0.1}, {"params": parameters[half:], "lr": 0.03}], momentum=0.5)


def train(
    scheduler: Callable[[Optimizer], Any] | None, *callbacks: Callback, resume: Path | None = None
) -> tuple[Used, Any, NaNGuard]:
    module = task(optimizer=groups, scheduler=scheduler)
    used = Used()
    guard = NaNGuard(thresholds=ONCE, remedies=[Rollback(), ReduceLR(rehearse=False)], snapshot_every_n_steps=1)
    trainer = trainer_for(
        None, guard, [Diverge(*BLOWN_UP_AFTER), used, *callbacks], max_epochs=EPOCHS, enable_checkpointing=True
    )
    # Without one of the test's own Lightning adds a ModelCheckpoint.
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint) or c in callbacks]
    data, val = Positioned(batches(count=BATCHES)), DataLoader(batches(count=1), batch_size=None)
    trainer.fit(module, data, val, ckpt_path=resume)
    return used, learner_of(trainer, module), guard


@pytest.mark.parametrize("name", FOURTEEN)
def test_rates_go_on(name: str, tmp_path: Path) -> None:
    """After a cut the rates, the multiplier and the weights are those of the run that was not stopped, whether it is
    resumed in mid-epoch or at an epoch's end."""
    # On a validation's end: what steps at the end of an epoch, plateau included, is then still to come.
    saves = SaveAt(BATCHES + 2, tmp_path / "mid.ckpt"), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, learner, guard = train(SCHEDULERS[name], *saves)
    assert min(whole.multipliers.values()) < 1.0, list(guard.interventions)
    for path, step in ((tmp_path / "mid.ckpt", BATCHES + 2), (tmp_path / "epoch=0.ckpt", BATCHES)):
        assert torch.load(path, weights_only=True)["global_step"] == step
        again, learner2, guard2 = train(SCHEDULERS[name], resume=path)
        assert again.rates == {at: rates for at, rates in whole.rates.items() if at >= step}
        assert guard2.lr_multiplier == guard.lr_multiplier
        assert differences(learner, learner2) == []
        assert sorted(again.rates) == list(range(step, STEPS))


def test_fourteen_schedulers() -> None:
    """The schedulers tried are fourteen of torch's own."""
    assert len(FOURTEEN) == 14
