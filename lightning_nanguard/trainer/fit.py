"""One fit: the guard, and what the trainer answers to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.checkpoints.last_good import LastGood
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.diagnosis.bundle import Bundles
from lightning_nanguard.diagnosis.clues import Look
from lightning_nanguard.distributed.group import Group
from lightning_nanguard.distributed.ranks import Alone, Ranks
from lightning_nanguard.guard.deferred import MAX_DELAY
from lightning_nanguard.guard.guard import Guard, Settings
from lightning_nanguard.metrics import NonFiniteRate
from lightning_nanguard.record.advice import AdviceLog
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.diagnostics import Diagnostics
from lightning_nanguard.trainer.private.averages import averaged_copies
from lightning_nanguard.trainer.private.best_model import keep_best_finite
from lightning_nanguard.trainer.private.callbacks import after_every_batch
from lightning_nanguard.trainer.private.checkpoint_files import catch_write_errors, write_checkpoint
from lightning_nanguard.trainer.private.learning_rate_monitor import around_learning_rate_monitors
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.precision import grad_scaler
from lightning_nanguard.trainer.private.saving import guard_saves
from lightning_nanguard.trainer.private.strategies import accumulation, collects, is_sharded, what_steps
from lightning_nanguard.types import Evidence, Fault, Finding, Intervention

_logger = logging.getLogger("lightning_nanguard")


@final
class Run:
    """The guard of one fit and its host, :class:`~lightning_nanguard.engine.Host`.

    Args:
        trainer: The trainer.
        module: Its module.
        detectors: What counts as a fault.
        policy: Decides.
        remedies: What may follow.
        ring: Keeps snapshots.
        settings: How the guard works.
        journal: Where records go.
        adviser: Where advice goes.
        examine_after: Updates after which a loss that has not moved is examined; ``None`` for never.
        bundles: Keeps incidents; ``None`` keeps none.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        detectors: Sequence[Detector],
        policy: Policy,
        remedies: Sequence[Remedy],
        ring: Ring,
        settings: Settings,
        journal: SinkDispatcher,
        adviser: AdviceLog,
        examine_after: int | None,
        bundles: Bundles | None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._journal = journal
        self._adviser = adviser
        self.rank_zero = trainer.is_global_zero
        self.records = next((sink.path for sink in journal.sinks if isinstance(sink, JsonLines)), None)
        self._unknown: set[int] = set()
        self.in_batch = False
        self._validation_bad: Tensor | None = None
        sharded = is_sharded(trainer)
        self._ranks: Ranks = Group(sharded=sharded) if trainer.world_size > 1 else Alone(sharded=sharded)
        optimizers, partitions = what_steps(trainer, module)
        self._accumulates = accumulation(trainer)
        learner = Learner(
            module,
            optimizers,
            scaler=grad_scaler(trainer),
            averages=lambda: averaged_copies(trainer, module),
            partitions=partitions,
        )
        # Read late, a fault is that of an earlier batch.
        late = settings.deferred or trainer.world_size > 1
        examined = examine_after is not None
        self.stage = TrainerBatchReplay(
            trainer,
            module,
            learner,
            self._ranks,
            lambda optimizer: self.guard.clip_now(optimizer),
            delay=MAX_DELAY if late else 0,
            updates=8 if examined else 4 if late else 1,
            small=256 if examined else 0,
        )
        self.guard = Guard(
            learner=learner,
            rate=LearningRate(optimizers),
            make_scope=self.stage.make_scope,
            host=self,
            detectors=detectors,
            remedies=remedies,
            policy=policy,
            ring=ring,
            settings=settings,
            ranks=self._ranks,
        )
        self.inquiry = Diagnostics(
            trainer,
            module,
            self.guard,
            self.stage,
            self._ranks,
            adviser=adviser,
            examine_after=examine_after,
            bundles=bundles,
        )
        self.last_good: LastGood | None = None
        self._undos: list[Callable[[], None]] = []

    def start(self, max_memory: float | None) -> None:
        """Look at the state before the first update, and take the places in the trainer that are needed."""
        self.guard.start()
        self._limit_memory(max_memory)
        rate = self.guard.rate
        self._undos = [
            around_learning_rate_monitors(self._trainer, rate.apply, rate.withdraw),
            guard_saves(
                self._trainer,
                self.guard.before_save,
                self.guard.mend,
                self.guard.after_save,
                collects=collects(self._trainer),
            ),
            keep_best_finite(self._trainer),
        ]

    def keep_last_good(self, folder: Path, every: int) -> None:
        """Write the last good checkpoint from now on."""
        trainer, guard = self._trainer, self.guard
        kept = LastGood(folder, every, guard.ring, lambda path: write_checkpoint(trainer, path), leads=self.rank_zero)
        kept.begin(guard.updates)
        self._undos += [
            after_every_batch(trainer, lambda: kept.close_batch(guard.updates)),
            catch_write_errors(trainer.strategy, kept.pending, kept.failed),
        ]
        guard.account.on_disk = kept.message
        self.last_good = kept

    def _limit_memory(self, max_memory: float | None) -> None:
        if max_memory is None or self.guard.ring.pending is None:
            return
        # Moments come with the first steps: two for each parameter is what Adam needs.
        learner = self.guard.learner
        stepped = [one for index in range(len(learner.optimizers)) for one in learner.stepped(index)]
        parameters = sum(one.nbytes for one in stepped if one.requires_grad)
        each = (self.guard.ring.pending.nbytes() + 2 * parameters) / 2**30
        # The pending one is whole, certified ones are shared among the ranks of a node.
        fitting = int((max_memory / each - 1) * self._ranks.sharers) if each else self.guard.ring.capacity
        fitting = min(self._ranks.gather(fitting))
        if fitting < 1:
            raise ValueError(
                f"NaNGuard(max_snapshot_memory={max_memory!r}): one snapshot takes about {each:.3g} GiB and two are "
                f"needed, one certified and one pending. Allow {2 * each:.3g} GiB, or leave the limit out and set "
                'snapshot_device="cpu".'
            )
        self.guard.ring.capacity = min(self.guard.ring.capacity, fitting)

    def non_finite_rate(self) -> float:
        """Share of the updates, over all ranks, whose loss or gradient was not finite."""
        # Ranks agree on every update, and need not wait for each other to add up.
        rate = NonFiniteRate(sync_on_compute=False)
        bad = self.guard.non_finite
        rate.update(torch.tensor(math.nan), times=bad)
        rate.update(torch.tensor(0.0), times=self.guard.updates - bad)
        return float(rate.compute())

    def close(self) -> None:
        """Let go of the trainer."""
        if self.last_good is not None:
            self.last_good.end()
        self.guard.close()
        while self._undos:
            self._undos.pop()()
        self._journal.close()
        self._adviser.close()

    def optimizer_index(self, optimizer: Optimizer) -> int | None:
        """Index of an optimizer that steps next; ``None`` where it does not, or was not there when the fit began."""
        if self._accumulates():
            return None
        for index, known in enumerate(self.guard.learner.optimizers):
            if known is optimizer or getattr(optimizer, "optimizer", None) is known:
                return index
        if id(optimizer) not in self._unknown:
            self._unknown.add(id(optimizer))
            _logger.warning(
                "NaNGuard: the optimizer %s that is about to step was not there when the fit began; its updates are "
                "not guarded.",
                type(optimizer).__name__,
            )
        return None

    def clock(self) -> tuple[int, int, int]:
        """``global_step``, epoch and batch index of now."""
        return self._trainer.global_step, self._trainer.current_epoch, self.stage.batch_idx

    def micro_batches(self) -> int:
        """By how many micro-batches the loss is divided."""
        return self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Why the fault of an update happened."""
        return self.inquiry.diagnose(fault, evidence, look, update)

    def record(self, intervention: Intervention) -> None:
        """Keep what was done."""
        self._journal.write(intervention)

    def see_validation(self, outputs: Any, batch_idx: int) -> None:
        """Note on the device whether a validation loss is finite."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._validation_bad = bad if self._validation_bad is None else self._validation_bad | bad

    def judge_validation(self) -> None:
        """Report a validation loss that was not finite."""
        bad, self._validation_bad = self._validation_bad, None
        if bad is None:
            names = (
                key
                for key, value in self._trainer.callback_metrics.items()
                if "loss" in key and key.startswith("val") and not bool(torch.isfinite(value).all())
            )
            mine = next(names, None)
        else:
            mine = "validation loss" if bool(bad) else None
        if mine is None:
            return
        batch_idx, self.stage.batch_idx = self.stage.batch_idx, -1
        message = f"the {mine} is not finite while the training loss is"
        self.guard.report(Fault("non_finite_validation", "state", mine, None, message))
        self.stage.batch_idx = batch_idx
