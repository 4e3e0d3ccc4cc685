"""Running code of the user's once more and undoing what it touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from lightning_nanguard._compat.packages import LightningModule, Trainer
from lightning_nanguard._compat.probe import quiet, same_randomness
from lightning_nanguard._compat.results import remember_running_means
from lightning_nanguard.batch_scope import BatchScope
from lightning_nanguard.untouched import attributes_kept


@contextmanager
def untraced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo at the end what a step touches: random streams, buffers, metrics, logged values, attributes.

    Args:
        trainer: The trainer.
        module: What is trained by it.
    """
    trace = BatchScope(module, [partial(remember_running_means, trainer)], thorough=True)
    trace.open()
    try:
        with same_randomness(module.device), quiet(trainer), attributes_kept(module), torch.enable_grad():
            yield
    finally:
        trace.undo()
