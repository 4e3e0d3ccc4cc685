"""Finds the user's hooks around the transfer of a batch to the device, which may change its values."""

from __future__ import annotations

from typing import Any

_AROUND = ("on_before_batch_transfer", "on_after_batch_transfer")


def changes_batches(trainer: Any, module: Any) -> bool:
    """Whether the module or the data module overrides a hook before or after the transfer of a batch."""
    return _overrides(trainer, module, *_AROUND)


def readable_loader(trainer: Any, module: Any) -> Any:
    """The training dataloader; ``None`` if hooks of the user change its batches before the module sees them."""
    return None if _overrides(trainer, module, *_AROUND, "transfer_batch_to_device") else trainer.train_dataloader


def _overrides(trainer: Any, module: Any, *names: str) -> bool:
    # Lightning's is_overridden does not know the classes of its other package.
    owners = (module, getattr(trainer, "datamodule", None))
    hooks = [getattr(owner, name, None) for owner in owners if owner is not None for name in names]
    homes = [str(getattr(hook, "__module__", "")) for hook in hooks if hook is not None]
    return not all(home.startswith(("pytorch_lightning.", "lightning.")) for home in homes)
