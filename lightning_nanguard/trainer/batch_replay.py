"""Checks the present batches and runs them again on the trainer's module, without side effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import fmean
from typing import Any, final

from torch import Tensor
from torch.nn import Parameter

from lightning_nanguard.act.clipping import Clipper
from lightning_nanguard.diagnosis.isolation import uncompiled
from lightning_nanguard.diagnosis.step_tracer import StepTrace, StepTracer, copies_of, put_back
from lightning_nanguard.distributed.ranks import Ranks
from lightning_nanguard.guard.loop import BatchReplay
from lightning_nanguard.measure.finite import batch_finite, non_finite_fields, non_finite_indices
from lightning_nanguard.measure.tensors import gradients
from lightning_nanguard.state.attributes import reach
from lightning_nanguard.state.batch_history import BatchHistory, MicroBatch
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.batches import BatchesThresholds
from lightning_nanguard.trainer.batch_runs import BatchRuns
from lightning_nanguard.trainer.private.clock import set_clock
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.running_means import remember_running_means
from lightning_nanguard.trainer.private.training_step import BareStep
from lightning_nanguard.trainer.private.untraced import untraced


@final
class TrainerBatchReplay(BatchReplay):
    """Runs batches again for the guard and for the diagnosis.

    Args:
        trainer: The trainer.
        module: Its module.
        learner: The learner.
        ranks: All processes.
        clipper: Clips gradients as the guard does now.
        delay: Number of further updates after which an update is known to be healthy.
        examined: Whether a loss that does not move will be examined, which takes many batches.
        thresholds: How many batches are kept.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        learner: Learner,
        ranks: Ranks,
        clipper: Clipper,
        *,
        delay: int,
        examined: bool,
        thresholds: BatchesThresholds,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._learner = learner
        self._ranks = ranks
        self._delay = delay
        self._limits = thresholds
        # Runs a batch once, without restoring anything but the containers of the batch.
        self.step = BareStep(trainer, thresholds.repeated)
        self._runs = BatchRuns(trainer, module, learner, ranks, clipper, self.step)
        self._distrusted = -1
        # Index of the micro-batch to diagnose, if only one of the window is bad.
        self.suspect: int | None = None
        self.batch: Any = None
        self.batch_idx = -1
        # Its epoch. The trainer's own counter is one ahead once the last epoch is over.
        self.epoch = 0
        kept = thresholds.micro_batches
        # After a late fault the updates since it are needed, too.
        updates = kept.updates_examined if examined else delay + 2 if delay else 1
        self.batches = BatchHistory(module.device, updates, kept.updates_small if examined else 0, thresholds)
        self._shown: list[MicroBatch] = []
        self._trace: StepTrace | None = None

    def make_undo(self, *, thorough: bool = False) -> BatchUndo:
        """An object that remembers what a batch may change, and undoes it; see :class:`BatchUndo`."""
        others = [partial(remember_running_means, self._trainer)]
        return BatchUndo(self._module, others, thorough=thorough, thresholds=self._limits.repeated)

    @contextmanager
    def suspecting(self, batch_idx: int) -> Iterator[None]:
        """Inside, one micro-batch of the present window is known to be the bad one."""
        before = self.batch_idx
        self.suspect = self.batch_idx = batch_idx
        try:
            with self.batches.as_begun():
                yield
        finally:
            self.suspect, self.batch_idx = None, before

    def remember(self, update: int) -> None:
        """The present batch is over, with ``update`` as its last update. Keep the batches now known to be healthy."""
        if not self._delay:
            self.batches.accept(self.batch, self.batch_idx)
        elif (known := update - self._delay) > self._distrusted:
            self.batches.accept_update(known)

    def distrust(self, update: int) -> None:
        """A fault was found in ``update``, so this and earlier updates are not known to be healthy."""
        self._distrusted = update

    @contextmanager
    def showing(self, update: int) -> Iterator[bool]:
        """Inside, the present batch is that of an earlier update. Yields whether this batch is still kept."""
        batch, batch_idx = self.batch, self.batch_idx
        self._shown = self.batches.of(update)
        if self._shown:
            self.batch, self.batch_idx = self._shown[-1].batch, self._shown[-1].index
        try:
            yield bool(self._shown)
        finally:
            self.batch, self.batch_idx, self._shown = batch, batch_idx, []

    def batch_finite(self) -> bool | None:
        """Whether the micro-batches of the present update are finite where the healthy ones before it are."""
        batches = [micro.batch for micro in self._at_hand()]
        finite = batch_finite(batches)
        if finite is not False:
            return finite
        return non_finite_fields(batches) <= non_finite_fields(self.batches.healthy_before())

    def batch_strange(self, *, extreme: bool = False) -> bool | None:
        """Whether the values of the present batch are far outside the range of the batches before, or far larger."""
        return None if self.batch is None else self.batches.strange(self.batch, extreme=extreme)

    def sizes_vary(self, updates: int) -> bool:
        """Whether the batches of the newest updates differ in their number of samples, or are not kept."""
        return self.batches.sizes_vary(updates)

    def bytes_kept(self) -> int:
        """Bytes of the batches that are kept for replays."""
        return self.batches.bytes_kept()

    def comparable(self) -> bool:
        """Whether a batch can be run again, which needs automatic optimization."""
        return bool(self._module.automatic_optimization)

    def probe(self, *, redrawn: bool = False) -> float | None:
        """Loss of the present batch under the present weights. It changes nothing.

        Args:
            redrawn: Whether to draw other random numbers than the recorded ones.
        """
        if not self._repeatable():
            return None
        return self._runs.loss(self.batch, self.batch_idx, self._rehearsal(redrawn=redrawn))

    def step_trace(self) -> StepTrace | None:
        """What was found when the first batch asked for was traced; ``None`` if it could not be run again."""
        if self._trace is None and self._repeatable():
            weights = [p for one in self._learner.optimizers for group in one.param_groups for p in group["params"]]
            copies = copies_of(weights)
            if False in self._ranks.gather(copies is not None) or copies is None:
                return None
            tracer = StepTracer(weights, self._module.named_parameters())

            @contextmanager
            def traced() -> Iterator[None]:
                with self._rehearsal(), uncompiled(), tracer:
                    yield

            whole = self._runs.loss(self.batch, self.batch_idx, traced()) is not None
            found = self._ranks.gather([tracer.own_targets, put_back(copies)])
            own, writes = (any(of_rank) for of_rank in zip(*found, strict=True))
            self._trace = StepTrace(own, writes, tracer.unused if whole else frozenset())
        return self._trace

    def gradient_finite(self) -> bool | None:
        """Whether the present batch has a finite gradient under the present weights. It removes the gradients."""
        if not self._repeatable():
            return None
        optimizer = self._learner.optimizers[0]
        loss = self._runs.gradients(self.batch, self.batch_idx, self._rehearsal())
        found = gradients(p for group in optimizer.param_groups for p in group["params"])
        finite = None if loss is None else math.isfinite(loss) and not non_finite_indices(found)
        optimizer.zero_grad(set_to_none=True)
        answers = self._ranks.gather(finite)
        return None if None in answers else all(answers)

    def rehearsing(self) -> AbstractContextManager[None]:
        """Inside, batches do not count as part of the run. At the end everything except the learner is restored."""
        return untraced(self._trainer, self._module, self._limits)

    def rehearsal_batches(self) -> int:
        """Number of batches for a rehearsal; 0 if no rehearsal is possible."""
        if not self._repeatable() or (self._ranks.world > 1 and 0 in self._learner.quasi_newton):
            return 0
        counts: list[int] = self._ranks.gather(len(self.batches.to_try_on(self.batch, self.batch_idx)))
        return min(counts)

    def train_on(self, index: int) -> float | None:
        """Make one plain update on a batch; return the loss before the update."""
        batch, batch_idx = self.batches.to_try_on(self.batch, self.batch_idx)[index]
        return self._runs.update(partial(self._runs.gradients, batch, batch_idx))

    def earlier(self) -> Sequence[Callable[[], float | None]]:
        """For each healthy batch that is kept, a function that returns its loss under the present weights."""
        return [partial(self._runs.loss, batch, batch_idx) for batch, batch_idx in self.batches.healthy]

    def trainable(self) -> bool:
        """Whether everything that an update needs is kept, so that it can be made from another state."""
        kept = self._limits.micro_batches.per_update
        alone = self._ranks.world == 1 or 0 not in self._learner.quasi_newton
        one = len(self._learner.optimizers) == 1 and not self._ranks.sharded
        if not (self.comparable() and one and alone and self._trainer.accumulate_grad_batches <= kept):
            return False
        # If the module reads an iterator of its own, such as a second loader, a repeated step would take the run's
        # data.
        return not reach(self._module, 0, self._limits.repeated).streams

    def train_at_hand(self) -> float | None:
        """Make the present update with its recorded random numbers; return the loss before the update."""
        return self._runs.update(partial(self._gradients_of, self._at_hand()))

    def loss_at_hand(self) -> float | None:
        """Loss of the present update under the present weights, with its recorded random numbers."""
        losses = []
        for micro in self._at_hand():
            self._rewind(micro)
            losses.append(self._runs.loss(micro.batch, micro.index))
        known = [loss for loss in losses if loss is not None]
        return fmean(known) if known and len(known) == len(losses) else None

    def _gradients_of(self, micros: Sequence[MicroBatch]) -> float | None:
        """Compute the gradients of the mean over micro-batches, with their recorded random numbers; return the loss."""
        losses: list[float] = []
        found: dict[Parameter, Tensor] = {}
        parameters = [p for group in self._learner.optimizers[0].param_groups for p in group["params"]]
        for micro in micros:
            self._rewind(micro)
            value = self._runs.gradients(micro.batch, micro.index)
            if value is None:
                return None
            losses.append(value)
            for p in parameters:
                if p.grad is not None:
                    share = p.grad / len(micros) if len(micros) > 1 else p.grad
                    found[p] = found[p] + share if p in found else share
        for parameter, gradient in found.items():
            parameter.grad = gradient
        return fmean(losses) if losses else None

    def loss_on(self, index: int) -> float | None:
        """Loss of a batch under the present weights."""
        return self._runs.loss(*self.batches.to_try_on(self.batch, self.batch_idx)[index])

    def _at_hand(self) -> list[MicroBatch]:
        """The micro-batches of the present update, or of the earlier one that :meth:`showing` shows."""
        return self._shown or self.batches.newest()

    def _repeatable(self) -> bool:
        one = len(self._learner.optimizers) == 1
        return self.comparable() and self.batch is not None and one and not self._ranks.sharded

    @contextmanager
    def _rehearsal(self, *, redrawn: bool = False) -> Iterator[None]:
        """Inside, the present batch runs in its own rehearsal, which needs memory for a copy."""
        with self.rehearsing():
            # A fault that depends on random numbers comes back only with the same numbers.
            for micro in [one for one in self._at_hand() if one.batch is self.batch][-1:]:
                self._rewind(micro, redrawn=redrawn)
            yield

    def _rewind(self, micro: MicroBatch, *, redrawn: bool = False) -> None:
        """Restore the clock and, unless they are drawn anew, the random streams as they were before a micro-batch."""
        if not redrawn:
            self.batches.rewind(micro)
        if micro.clock is not None:
            set_clock(self._trainer, *micro.clock)

    def rerun(self, micro: MicroBatch, full_precision: bool) -> Tensor | None:
        """Loss of a micro-batch with its graph, with its recorded random numbers."""
        self._rewind(micro)
        return self.step.loss_with_graph(micro.batch, micro.index, full_precision=full_precision)

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Undo at the end everything that runs inside. Inside, no rank waits for another."""
        with untraced(self._trainer, self._module, self._limits), self._runs.silently():
            yield
