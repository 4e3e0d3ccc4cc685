"""Something done within a fit, where the trainer's loops are set up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback

from tests.helpers import Run, batches, fit, task


class _AtEnd(Callback):
    def __init__(self, function: Callable[[Any, Any], None]) -> None:
        self.function, self.calls = function, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.function(trainer, pl_module)
            self.calls += 1


def during_fit(function: Callable[[Any, Any], None], model: str = "mlp", **options: Any) -> Run:
    """Call ``function`` with trainer and module at the end of the second batch of a run."""
    asked = _AtEnd(function)
    run = fit(task(model, metric=True), batches(count=2), callbacks=[asked], **options)
    assert asked.calls == 1
    return run
