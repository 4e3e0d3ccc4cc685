"""Hooks that may change whole batches before the step, and the training data as the module is given it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning import LightningDataModule, LightningModule

from lightning_nanguard.trainer.private.transfer_hooks import changes_batches, readable_loader


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


class Holder:
    train_dataloader = "loader"
    datamodule: Any = None


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
@pytest.mark.parametrize("kind", [LightningModule, LightningDataModule])
def test_hooks_that_change_a_batch(hook: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader is told where nothing of the user's changes its batches, in module and data module."""
    changed: Any = type("Changed", (kind,), {hook: lambda self, batch, *args: batch})()
    holder, module = Holder(), LightningModule()
    assert readable_loader(holder, module) == "loader"
    if kind is LightningDataModule:
        holder.datamodule = LightningDataModule()
        assert readable_loader(holder, module) == "loader"
        holder.datamodule = changed
    else:
        module = changed
    assert readable_loader(holder, module) is None
