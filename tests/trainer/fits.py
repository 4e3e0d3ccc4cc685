"""Short fits whose parts are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning import Callback

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.fit import Fit
from tests.helpers import Batch, Run, Task, batches, fit, task


class Captures(Callback):
    """Keeps the parts of a guarded fit, and looks at them at the end of each batch.

    Args:
        guard: The guard.
        look: What is noted of the fit at the end of each batch.
    """

    def __init__(self, guard: NaNGuard, look: Callable[[Fit], Any] = lambda fit: None) -> None:
        self.guard = guard
        self.look = look
        self.seen: list[Any] = []
        self.fit: Fit

    def on_train_start(self, *_: Any) -> None:
        assert self.guard._fit is not None
        self.fit = self.guard._fit

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.look(self.fit))


def captured(
    guard: NaNGuard,
    *,
    module: Task | None = None,
    data: Sequence[Batch] | None = None,
    look: Callable[[Fit], Any] = lambda fit: None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> tuple[Captures, Run]:
    """Train for a moment; gives the parts of the fit, and the run."""
    seen = Captures(guard, look)
    module = task() if module is None else module
    data = batches(count=2) if data is None else data
    return seen, fit(module, data, guard, callbacks=[*callbacks, seen], **options)
