"""Checks whether hooks around the transfer of a batch to the device may change its values."""

from __future__ import annotations

from typing import Any

from lightning_nanguard.trainer.private.packages import LightningModule


def changes_batches(trainer: Any, module: LightningModule) -> bool:
    """Whether the module or the data module overrides a hook that gets batches before the step.

    Args:
        trainer: The trainer.
        module: Its module.
    """
    owners = (module, getattr(trainer, "datamodule", None))
    names = ("on_before_batch_transfer", "on_after_batch_transfer")
    found = [getattr(owner, name, None) for owner in owners if owner is not None for name in names]
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("pytorch_lightning.", "lightning.pytorch."))
        for hook in found
        if hook is not None
    )
