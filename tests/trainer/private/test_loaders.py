"""The training data as the module is given it."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning import LightningDataModule, LightningModule

from lightning_nanguard.trainer.private.loaders import readable_loader

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Holder:
    train_dataloader = "loader"
    datamodule: Any = None


@pytest.mark.parametrize("hook", HOOKS)
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
