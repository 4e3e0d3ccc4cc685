"""Running code of the user's once more and undoing what it touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.replay import quiet, same_randomness
from lightning_nanguard.trainer.private.results import remember_running_means


@contextmanager
def untraced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo at the end what a step touches: random streams, buffers, metrics, logged values, attributes.

    Args:
        trainer: The trainer.
        module: What is trained by it.
    """
    trace = BatchUndo(module, [partial(remember_running_means, trainer)], thorough=True)
    trace.open()
    try:
        with same_randomness(module.device), quiet(trainer), attributes_kept(module), torch.enable_grad():
            yield
    finally:
        trace.undo()
