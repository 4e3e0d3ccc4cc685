"""Runs batches outside the loops: losses, gradients and updates, in the same way on all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import torch

from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.distributed.collectives import ForbidCollectives
from lightning_nanguard.distributed.ranks import Ranks, mean_over_ranks
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.training_step import BareStep, alone, clip_as_configured
from lightning_nanguard.trainer.private.untraced import unlogged
from lightning_nanguard.trainer.repeat.numeric_errors import may_be_numeric

_logger = logging.getLogger("lightning_nanguard")
_AS_IT_IS = nullcontext()


@final
class BatchRuns:
    """Runs batches on the trainer's module. An error in such a run is logged, and does not end the run of the user.

    All ranks must call its methods together. Each gets the mean over the ranks.

    Args:
        trainer: The trainer.
        module: Its module.
        learner: The learner. Gradients and updates are those of its first optimizer.
        ranks: All processes.
        clipper: Clips gradients as the guard does now.
        step: Runs ``training_step``.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        learner: Learner,
        ranks: Ranks,
        clipper: Clipper,
        step: BareStep,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._learner = learner
        self._ranks = ranks
        self._clipper = clipper
        self._step = step

    def loss(self, batch: Any, batch_idx: int, around: AbstractContextManager[None] = _AS_IT_IS) -> float | None:
        """Loss of a batch under the present weights; ``None`` if it cannot be run.

        Args:
            batch: The batch.
            batch_idx: Its index.
            around: A context in which it runs.
        """
        # With gradients, because the loss itself may need some: of inputs, or of an inner step.
        return self._attempt(partial(self._step.loss, batch, batch_idx), batch, around)

    def gradients(self, batch: Any, batch_idx: int, around: AbstractContextManager[None] = _AS_IT_IS) -> float | None:
        """Compute the gradients of a batch, and return its loss. The arguments are those of :meth:`loss`."""
        run = partial(self._step.forward_backward, self._learner.optimizers[0], batch, batch_idx)
        value = self._attempt(run, batch, around)
        if value is not None and self._ranks.world > 1:
            self._average_gradients()
        return value

    def update(self, gradients: Callable[[], float | None]) -> float | None:
        """Make one update; return the loss before the update, or ``None`` if it could not be made.

        Args:
            gradients: Computes the gradients, and returns the loss.
        """
        optimizer, seen = self._learner.optimizers[0], list[float]()

        def closure() -> float:
            value = gradients()
            if value is None:
                raise RuntimeError("the loss is not known")
            self._clipper.clip(self._learner.gradients(0))
            clip_as_configured(self._trainer, optimizer)
            seen.append(value)
            return value

        try:
            with torch.enable_grad():
                optimizer.step(closure)  # as in Lightning: some optimizers call it several times
        except Exception as error:
            _logger.debug("NaNGuard: an update could not be made again: %r", error)
            return None
        return seen[0]

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Inside, nothing is logged, and no rank waits for another: if one fails here, the others must not wait."""
        solitary = alone(self._trainer, ForbidCollectives()) if self._ranks.world > 1 else nullcontext()
        with solitary, unlogged(self._module):
            yield

    def _attempt(
        self, run: Callable[[], float | None], batch: Any, around: AbstractContextManager[None]
    ) -> float | None:
        value = None
        try:
            with self.silently(), around:
                value = run()
        except Exception as error:
            # All ranks must learn of the error, because the ranks without an error would wait.
            _logger.debug("NaNGuard: a batch could not be run again: %r", error)
            value = math.nan if may_be_numeric(error, batch) else None
        return mean_over_ranks(self._ranks, value)

    def _average_gradients(self) -> None:
        groups = self._learner.optimizers[0].param_groups
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.average([parameter.grad for parameter in parameters if parameter.grad is not None])
