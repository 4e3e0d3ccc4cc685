"""Hooks that may change whole batches before the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule

from lightning_nanguard.trainer.private.transfer_hooks import changes_batches


class Changes(LightningModule):
    """A module with such a hook."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class ChangesData(LightningDataModule):
    """A data module with such a hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_hooks_of_the_users_own_count() -> None:
    """Those of the module and of the data module; Lightning's own change nothing."""
    plain = SimpleNamespace(datamodule=LightningDataModule())
    assert not changes_batches(plain, LightningModule())
    assert not changes_batches(SimpleNamespace(datamodule=None), LightningModule())
    assert changes_batches(plain, Changes())
    assert changes_batches(SimpleNamespace(datamodule=ChangesData()), LightningModule())
