"""A fit as far as its first batch, and Lightning's own messages."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nanguard.trainer.private.first_batch import at_first_batch, one_batch, without_messages
from tests.helpers import Batch, batches, copied, differences, mlp, trainer_for


class Plain(LightningModule):
    """Has no validation; a hook of its own doubles batches on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * part for part in batch]


DATA = DataLoader(batches(count=3), batch_size=None)


def test_the_fit_ends_before_its_first_step(tmp_path: Path) -> None:
    """The first batch is shown as the module gets it, no update is made, and the trainer's callbacks are as before."""
    trainer, module = trainer_for(tmp_path), Plain()
    before, callbacks = copied(dict(module.state_dict())), list(trainer.callbacks)
    seen: list[Any] = []
    at_first_batch(trainer, module, lambda *given: seen.append(given), train_dataloaders=DATA)
    ((given_trainer, given_module, batch, index),) = seen
    assert (given_trainer, given_module, index) == (trainer, module, 0)
    assert differences(list(batch), [2 * part for part in batches(count=3)[0]]) == []
    assert differences(dict(module.state_dict()), before) == []
    assert set(trainer.callbacks) == set(callbacks)
    assert trainer.global_step == 0


def test_errors_of_the_look_reach_the_caller(tmp_path: Path) -> None:
    """What is raised while looking is no end of the look, and the trainer's callbacks are as before all the same."""

    def fails(*given: Any) -> None:
        raise ZeroDivisionError("looking")

    trainer = trainer_for(tmp_path)
    callbacks = list(trainer.callbacks)
    with pytest.raises(ZeroDivisionError, match="looking"):
        at_first_batch(trainer, Plain(), fails, train_dataloaders=DATA)
    assert set(trainer.callbacks) == set(callbacks)


def test_a_batch_is_given_as_it_is() -> None:
    """No transfer hook of the module changes it on its way, and the module is as before."""
    module, batch = Plain(), {"anything": [torch.ones(2)]}
    seen: list[Any] = []
    one_batch(module, batch, lambda trainer, module, given, index: seen.append(given))
    assert len(seen) == 1
    assert seen[0] is batch
    assert "_on_before_batch_transfer" not in vars(module)


NAMES = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")


def test_messages_are_kept_away_inside_only() -> None:
    """Inside no hint and no warning is shown; afterwards the levels are what they were."""
    levels = [logging.getLogger(name).level for name in NAMES]
    with without_messages():
        assert all(logging.getLogger(name).level == logging.ERROR for name in NAMES)
        warnings.warn("would be an error here", UserWarning, stacklevel=1)
    assert [logging.getLogger(name).level for name in NAMES] == levels
