"""NaNGuard: Lightning's hooks translated for the :class:`~lightning_nanguard.engine.Guard`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_nanguard._compat.best import keep_best_finite
from lightning_nanguard._compat.callbacks import averaged_copies, put_first, swaps_weights
from lightning_nanguard._compat.keeping import after_every_batch, forgive, write_through
from lightning_nanguard._compat.loading import readable_loader
from lightning_nanguard._compat.packages import GuardCallback, LightningModule, Trainer, logged_at, rank_zero_info
from lightning_nanguard._compat.precision import autocasts_to_half, grad_scaler
from lightning_nanguard._compat.probe import (
    alone,
    clip_as_configured,
    forward_backward,
    loss_with_graph,
    quiet,
    run_training_step,
    same_randomness,
)
from lightning_nanguard._compat.results import remember_running_means
from lightning_nanguard._compat.resuming import before_resuming
from lightning_nanguard._compat.saving import guard_saves
from lightning_nanguard._compat.schedulers import around_learning_rate_monitors
from lightning_nanguard._compat.strategies import check_strategy, is_sharded
from lightning_nanguard.batch_scope import BatchScope
from lightning_nanguard.bundle import Bundle, Bundles, safetensors, state_of
from lightning_nanguard.detectors import Detector, default_detectors, require
from lightning_nanguard.diagnosis.clues import Look
from lightning_nanguard.diagnosis.diagnostician import Diagnostician
from lightning_nanguard.diagnosis.examination import Examination
from lightning_nanguard.diagnosis.state import good_state
from lightning_nanguard.diagnosis.tape import Micro, Tape
from lightning_nanguard.distributed import Alone, Group, Ranks, Silent, mean
from lightning_nanguard.engine import Guard, Settings
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.events import Advice, Fault, Finding, Intervention
from lightning_nanguard.journal import Adviser, Console, Journal, JsonLines, Memory, Sink, summary
from lightning_nanguard.last_good import LastGood
from lightning_nanguard.learner import Learner
from lightning_nanguard.learning_rate import LearningRate
from lightning_nanguard.measure import batch_finite, gradients, suspects
from lightning_nanguard.metrics import NonFiniteRate
from lightning_nanguard.policy import Budget, Evidence, Policy
from lightning_nanguard.preflight import LOW, Preflight
from lightning_nanguard.recent import RecentBatches
from lightning_nanguard.remedies import Remedy, default_remedies, executors
from lightning_nanguard.resuming import Gate
from lightning_nanguard.ring import Ring
from lightning_nanguard.snapshot import Snapshot
from lightning_nanguard.untouched import attributes_kept

_logger = logging.getLogger("lightning_nanguard")

STATE_SCHEMA = 1
"""Version of what :meth:`NaNGuard.state_dict` gives; raised when an entry changes its meaning."""


@final
class NaNGuard(GuardCallback):
    """Keeps a training run alive through NaN and divergence.

    It sees a non-finite or diverging loss or gradient, keeps it from the weights, goes back to the last good state if
    the weights are already lost, lowers the learning rate or turns clipping on if the run itself is at fault, and
    writes down what it did. When it cannot help, it stops the run with the last good weights in place. A healthy run
    is the same bit for bit with and without it.

    Args:
        detectors: What counts as a fault, asked in this order; ``None`` for :class:`NonFinite`,
            :class:`GradientSpike` and :class:`DivergingLoss` with their defaults.
        remedies: What may follow when skipping the batch is not enough, in order of preference; ``None`` for
            :class:`Rollback`, :class:`ClipGradients` and :class:`ReduceLR`. ``[]`` only skips,
            ``[StopTraining()]`` stops.
        snapshot_every_n_steps: Updates between snapshots of the learner; ``"auto"`` keeps them at about 1 % of the
            run's time.
        snapshot_device: Where snapshots lie: ``"same"`` beside the weights; ``"cpu"`` in host memory (pinned, where the
            weights are on a CUDA device: the copy goes on beside the next forward and backward); ``"auto"`` beside the
            weights where the first updates have left room for them, else in host memory.
        max_snapshots: Certified snapshots kept (one more is always pending).
        max_snapshot_memory: Limit in GiB for all snapshots; fewer are kept where they do not fit, at least one.
        budget: Bounds on interventions, past which the run is stopped.
        dirpath: Folder of the records and of the last good checkpoint; ``None`` for ``<log_dir>/nanguard``.
        readback: ``"step"`` reads each update's loss and gradient norm before the step; ``"deferred"`` reads them up
            to two steps later without waiting for the device; ``"auto"`` takes ``"step"`` on CPU, ``"deferred"`` on
            CUDA with an optimizer that can skip on the device (``fused=True``), else ``"step"``.
        observe: Record what would be done and change nothing.
        preflight: Look at the data and the untrained model before the first step, with the first batch, and give
            advice; it changes nothing.
        examine_after: Updates after which a loss that has not moved, at a high level, is examined for what keeps it
            there (vanishing gradients, dead units, oscillation, a saddle point, …): advice, and no trace.
        bundle_dir: Folder where the batch and the state of up to ten incidents are kept, to be replayed elsewhere with
            ``nanguard replay``; they hold data of the run. ``None`` keeps none. Needs the extra ``bundle``.
        on_intervention: Called with each :class:`Intervention`.
        last_good_every_n_steps: Updates between writes of ``nanguard-last-good.ckpt``, a whole checkpoint that takes
            the place of the older one only when its state was certified; ``None`` writes none.
        resume: What to do with a ``ckpt_path`` that is poisoned or torn: ``"strict"`` raises
            :class:`BadCheckpointError`, ``"last-good"`` goes on from the newest good checkpoint near it.

    Raises:
        ValueError: When an argument is out of its range or contradicts another.
        TypeError: When a detector, remedy or budget is none.
        ModuleNotFoundError: When ``bundle_dir`` is given and safetensors is not installed.

    Example:
        >>> guard = NaNGuard(snapshot_every_n_steps=50)
        >>> len(guard.interventions), guard.lr_multiplier
        (0, 1.0)
    """

    def __init__(
        self,
        detectors: list[Detector] | None = None,
        remedies: list[Remedy] | None = None,
        snapshot_every_n_steps: int | Literal["auto"] = "auto",
        snapshot_device: Literal["auto", "same", "cpu"] = "auto",
        max_snapshots: int = 3,
        max_snapshot_memory: float | None = None,
        budget: Budget | None = None,
        dirpath: str | Path | None = None,
        readback: Literal["auto", "step", "deferred"] = "auto",
        observe: bool = False,
        preflight: bool = False,
        examine_after: int | None = None,
        bundle_dir: str | Path | None = None,
        on_intervention: Callable[[Intervention], Any] | None = None,
        last_good_every_n_steps: int | None = None,
        resume: Literal["strict", "last-good"] = "strict",
    ) -> None:
        super().__init__()
        self._detectors = _instances("detectors", detectors, Detector, default_detectors)
        self._remedies = _instances("remedies", remedies, Remedy, default_remedies)
        executors(self._remedies)
        every = snapshot_every_n_steps
        require(
            every == "auto" or _is_count(every),
            self,
            "snapshot_every_n_steps",
            every,
            '"auto" or an integer of at least 1',
        )
        devices = ("auto", "same", "cpu")
        require(snapshot_device in devices, self, "snapshot_device", snapshot_device, f"one of {devices}")
        require(_is_count(max_snapshots), self, "max_snapshots", max_snapshots, "an integer of at least 1")
        limit = max_snapshot_memory
        is_size = isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0
        require(limit is None or is_size, self, "max_snapshot_memory", limit, "a number of GiB above 0, or None")
        readbacks = ("auto", "step", "deferred")
        require(readback in readbacks, self, "readback", readback, f"one of {readbacks}")
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"NaNGuard(budget={budget!r}): expected a Budget, but got {type(budget).__name__}.")
        if on_intervention is not None and not callable(on_intervention):
            raise TypeError(f"NaNGuard(on_intervention={on_intervention!r}): expected a callable.")
        steps = last_good_every_n_steps
        valid = steps is None or _is_count(steps)
        require(valid, self, "last_good_every_n_steps", steps, "an integer of at least 1, or None")
        require(resume in ("strict", "last-good"), self, "resume", resume, 'one of ("strict", "last-good")')
        self._last_good_every = last_good_every_n_steps
        self._resume = resume
        self._gate: Gate | None = None
        self._undo_gate: Callable[[], None] = _nothing
        self._every = None if isinstance(every, str) else every
        self._snapshot_device = snapshot_device
        self._max_snapshots = max_snapshots
        self._max_snapshot_memory = max_snapshot_memory
        self._budget = budget or Budget()
        self._dirpath = None if dirpath is None else Path(dirpath)
        self._readback = readback
        self._observe = observe
        require(
            examine_after is None or (_is_count(examine_after) and examine_after >= 16),
            self,
            "examine_after",
            examine_after,
            "None or an integer of at least 16",
        )
        self._preflight = preflight
        self._examine_after = examine_after
        self._bundle_dir = None if bundle_dir is None else Path(bundle_dir)
        if bundle_dir is not None:
            safetensors()
        self._advice: list[Advice] = []
        self._on_intervention = on_intervention
        self._memory = Memory()
        self._resumed: Mapping[str, Any] | None = None
        self._run: _Run | None = None
        self._last_state: dict[str, Any] = {}
        self._multiplier = 1.0
        self._non_finite_rate: float | None = None
        self._before: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    # ------------------------------------------------------------------------------------------------ what users read

    @property
    def interventions(self) -> Sequence[Intervention]:
        """The newest interventions, oldest first; all of them are on disk."""
        return self._memory

    @property
    def advice(self) -> Sequence[Advice]:
        """What was noticed in the last fit and left alone, such as by the preflight."""
        return tuple(self._advice)

    @property
    def lr_multiplier(self) -> float:
        """What the scheduled learning rates are multiplied by now."""
        return self._run.guard.rate.ratio() if self._run is not None else self._multiplier

    @property
    def non_finite_rate(self) -> float | None:
        """Share of the updates, over all ranks, whose loss or gradient was not finite; ``None`` before a fit's end."""
        return self._non_finite_rate

    @property
    def clip_val(self) -> float | None:
        """The clipping value the guard has turned on, ``None`` without one."""
        return self._run.guard.clip_val if self._run is not None else None

    def examine(self) -> None:
        """Examine the run at the end of the batch at hand; what is found is in :attr:`advice` then, and on record.

        Under manual optimization, and with several processes, a batch cannot be run again, and nothing is found.

        Raises:
            RuntimeError: Outside of a fit.
        """
        self._running().examination_due = True

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the first place among the callbacks, and look at the checkpoint that is gone on from.

        Raises:
            ValueError: When the strategy is not supported.
        """
        if stage == "fit":
            check_strategy(trainer)
            put_first(trainer, self)
            self._undo_gate()
            folders = [] if self._dirpath is None else [self._dirpath]
            self._gate = Gate(pl_module, folders, take=self._resume == "last-good", observe=self._observe)
            self._undo_gate = before_resuming(trainer, self._gate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the guard of this fit and look at the state before the first update."""
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise ValueError(
                f"NaNGuard has nothing to guard: {type(pl_module).__name__} has no trainable parameter. "
                "Set requires_grad on the parameters to train, or take the guard out of the callbacks."
            )
        self._run = _Run(
            trainer,
            pl_module,
            detectors=self._detectors,
            policy=Policy(self._remedies, self._budget),
            remedies=self._remedies,
            ring=Ring(self._max_snapshots),
            settings=Settings(
                snapshot_every=self._every,
                snapshot_device=torch.device("cpu") if self._snapshot_device == "cpu" else None,
                choose_place=self._snapshot_device == "auto",
                deferred=_deferred(self._readback, trainer, pl_module),
                observe=self._observe,
            ),
            journal=Journal(self._sinks(trainer, pl_module)),
            adviser=self._adviser(trainer),
            examine_after=self._examine_after,
            bundles=Bundles(self._bundle_dir) if self._bundle_dir is not None and trainer.is_global_zero else None,
        )
        self._run.preflight_due = self._preflight and trainer.global_step == 0
        self._before = (Counter(self._memory.faults), Counter(self._memory.remedies))
        if self._resumed is not None:
            self._run.guard.load_state_dict(self._resumed)
            self._resumed = None
        self._run.start(self._max_snapshot_memory)
        if self._last_good_every is not None:
            self._run.keep_last_good(_records(trainer, self._dirpath).parent, self._last_good_every)
        self._tell_resumed()

    def _tell_resumed(self) -> None:
        self._undo_gate()
        gate, self._gate = self._gate, None
        if gate is not None and gate.taken is not None:
            message = f"{gate.refused}; the run goes on from {gate.taken.path} of step {gate.taken.global_step}"
            self._running().guard.note(Fault("bad_checkpoint", "state", "ckpt_path", None, message), "resume")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the batch may touch."""
        run = self._running()
        run.batch, run.batch_idx = batch, batch_idx
        if run.preflight_due:
            run.preflight(batch)
        run.tape.add(run.guard.updates + 1, batch_idx, batch)
        run.guard.open_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the loss."""
        self._running().guard.see_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, detect, and block a bad update."""
        run = self._running()
        stream = run.stream(optimizer)
        if stream is not None:
            run.guard.before_step(stream)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, act, record; certify and take snapshots."""
        run = self._running()
        run.batch, run.batch_idx = batch, batch_idx
        run.in_batch = True
        if run.last_good is not None and run.last_good.due(run.guard.updates):
            run.guard.want_snapshot()
        try:
            if run.guard.close_batch():
                run.recent.add(batch, batch_idx)
            run.examine_if_due()
        finally:
            run.in_batch = False
            run.batch = None
            if not run.guard.in_window:
                run.tape.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note on the device whether the validation loss is finite."""
        if self._run is not None and not trainer.sanity_checking:
            self._run.see_validation(outputs, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the state before averages take its place."""
        if self._run is not None and swaps_weights(trainer):
            self._run.guard.check()
            self._run.guard.swapped = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look into a validation loss that was not finite, before anything is saved on its account."""
        if self._run is not None and not trainer.sanity_checking:
            self._run.guard.swapped = False
            self._run.judge_validation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a good state behind."""
        self._undo_gate()
        run = self._run
        if run is None:
            return
        try:
            run.guard.rate.withdraw()
            run.guard.part()
            if not isinstance(exception, TrainingDivergedError):
                run.guard.check()  # what is saved on its account comes after this hook
        except Exception as error:
            # Whatever ended the run must be what the user sees.
            _logger.error("NaNGuard: while the run was ending: %s", error)
        try:
            self._end()  # Lightning calls no teardown after an exception
        except Exception as error:
            _logger.error("NaNGuard: while the run was ending: %s", error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is still on its way, leave a good state, and count over all ranks."""
        if self._run is not None:
            self._run.guard.finish()
            self._non_finite_rate = self._run.non_finite_rate()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say in one line what happened, and let go of the run."""
        self._end()

    def _end(self) -> None:
        self._undo_gate()
        run, self._run = self._run, None
        if run is None:
            return
        self._multiplier = run.guard.rate.ratio()
        self._last_state = run.guard.state_dict()
        if run.rank_zero:
            rank_zero_info(
                summary(
                    run.guard.updates,
                    self._memory.faults - self._before[0],
                    self._memory.remedies - self._before[1],
                    lr_multiplier=self._multiplier,
                    path=run.records,
                    observe=self._observe,
                )
            )
        run.close()

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Multiplier, clipping, windows, budgets and counts, in plain containers."""
        state = self._run.guard.state_dict() if self._run is not None else dict(self._last_state)
        if not state:
            return {}
        return {"schema": STATE_SCHEMA, "guard": state, "interventions": self._memory.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the fit starts: optimizers do not exist yet."""
        schema = state_dict.get("schema", STATE_SCHEMA)
        if schema != STATE_SCHEMA:
            _logger.warning(
                "NaNGuard: the checkpoint holds the guard's state in version %s, and this lightning-nanguard reads "
                "version %s: the run goes on, but multiplier, clipping, budgets and windows start anew. Install the "
                "version that wrote it to take them up.",
                schema,
                STATE_SCHEMA,
            )
            return
        self._resumed = state_dict.get("guard")
        self._memory.total = int(state_dict.get("interventions", 0))

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("NaNGuard was asked to watch a step before on_train_start; add it before fit begins.")
        return self._run

    def _sinks(self, trainer: Trainer, module: LightningModule) -> list[Sink]:
        sinks: list[Sink] = [self._memory]
        if self._on_intervention is not None:
            sinks.append(_Call(self._on_intervention))
        path = _records(trainer, self._dirpath)  # on all ranks: the trainer's log_dir is a broadcast
        if not trainer.is_global_zero:
            return sinks
        return [*sinks, JsonLines(path), Console(), _Loggers(trainer, self, module)]

    def _adviser(self, trainer: Trainer) -> Adviser:
        path = _records(trainer, self._dirpath).with_name("advice.jsonl")
        adviser = Adviser(JsonLines(path) if trainer.is_global_zero else None)
        self._advice = adviser.given
        return adviser


class _RehearsalError(Exception):
    """A rehearsed update could not be made."""


@final
class _Run:
    """One fit: the guard, and what the trainer answers to it."""

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
        journal: Journal,
        adviser: Adviser,
        examine_after: int | None,
        bundles: Bundles | None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._journal = journal
        self._adviser = adviser
        self._bundles = bundles
        self.preflight_due = False
        self.rank_zero = trainer.is_global_zero
        self.records = next((sink.path for sink in journal.sinks if isinstance(sink, JsonLines)), None)
        self.batch: Any = None
        # Read late, a fault is that of an earlier batch.
        late = settings.deferred or trainer.world_size > 1
        examined = examine_after is not None
        self.tape = Tape(module.device, updates=8 if examined else 4 if late else 1, small=256 if examined else 0)
        self.recent = RecentBatches()
        self.examination_due = False
        self._unknown: set[int] = set()
        self.batch_idx = -1
        self.in_batch = False
        self._validation_bad: Tensor | None = None
        learner = Learner(
            module,
            trainer.optimizers,
            scaler=grad_scaler(trainer),
            averages=lambda: averaged_copies(trainer, module),
        )
        rate = LearningRate(trainer.optimizers)
        self._ranks: Ranks = Group(sharded=is_sharded(trainer)) if trainer.world_size > 1 else Alone()
        self.guard = Guard(
            learner=learner,
            rate=rate,
            make_scope=self._make_scope,
            host=self,
            detectors=detectors,
            remedies=remedies,
            policy=policy,
            ring=ring,
            settings=settings,
            ranks=self._ranks,
        )
        self._diagnostician = Diagnostician(
            learner,
            ring,
            self._rerun,
            self._untraced,
            loss_scale=self._loss_scale,
            low_precision=autocasts_to_half(trainer),
        )
        self.last_good: LastGood | None = None
        self._undos: list[Callable[[], None]] = []
        self._examination = Examination(learner, self._rerun, self._untraced, examine_after)

    def start(self, max_memory: float | None) -> None:
        self.guard.start()
        self._limit_memory(max_memory)
        rate = self.guard.rate
        rate.attach()
        self._undos = [
            around_learning_rate_monitors(self._trainer, rate.apply, rate.withdraw),
            guard_saves(self._trainer, self.guard.before_save, self.guard.mend),
            keep_best_finite(self._trainer),
        ]

    def keep_last_good(self, folder: Path, every: int) -> None:
        """Write the last good checkpoint from now on."""
        trainer, guard = self._trainer, self.guard
        kept = LastGood(folder, every, guard.ring, lambda path: write_through(trainer, path), leads=self.rank_zero)
        kept.begin(guard.updates)
        self._undos += [
            after_every_batch(trainer, lambda: kept.close_batch(guard.updates)),
            forgive(trainer.strategy, kept.pending, kept.failed),
        ]
        guard.on_disk = kept.told
        self.last_good = kept

    def _limit_memory(self, max_memory: float | None) -> None:
        if max_memory is None or self.guard.ring.pending is None:
            return
        # Moments come with the first steps: two for each parameter is what Adam needs.
        parameters = sum(p.nbytes for p in self._module.parameters() if p.requires_grad)
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
        # Ranks agree on every update, and need not wait for each other to add up.
        rate = NonFiniteRate(sync_on_compute=False)
        bad = self.guard.non_finite
        rate.update(torch.tensor(math.nan), times=bad)
        rate.update(torch.tensor(0.0), times=self.guard.updates - bad)
        return float(rate.compute())

    def close(self) -> None:
        self.guard.close()
        if self.last_good is not None:
            self.last_good.end()
        while self._undos:
            self._undos.pop()()
        self._journal.close()
        self._adviser.close()

    def _make_scope(self, *, thorough: bool = False) -> BatchScope:
        return BatchScope(self._module, [lambda: remember_running_means(self._trainer)], thorough=thorough)

    def stream(self, optimizer: Optimizer) -> int | None:
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

    # Host

    def clock(self) -> tuple[int, int, int]:
        return self._trainer.global_step, self._trainer.current_epoch, self.batch_idx

    def micro_batches(self) -> int:
        return self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1

    def batch_finite(self) -> bool | None:
        return batch_finite([micro.batch for micro in self.tape.newest()])

    def batch_strange(self) -> bool | None:
        return None if self.batch is None else self.recent.strange(self.batch)

    def comparable(self) -> bool:
        return bool(self._module.automatic_optimization)

    def probe(self) -> float | None:
        if not self.comparable() or self.batch is None or self._ranks.sharded:
            return None
        trace = self._make_scope(thorough=True)
        trace.open()
        value = None
        try:
            with self._again():
                loss = run_training_step(self._trainer, self.batch, self.batch_idx)
                value = None if loss is None else float(loss)
        except Exception as error:
            # A second look must never cost the run that the first one would not have.
            _logger.debug("NaNGuard: the batch could not be looked at again: %r", error)
        finally:
            trace.undo()
        return mean(self._ranks, value)

    @contextmanager
    def _again(self) -> Iterator[None]:
        # Each rank for itself: one on which this fails must not leave others waiting for it.
        with same_randomness(self._module.device), quiet(self._trainer), self._silently():
            yield

    @contextmanager
    def _silently(self) -> Iterator[None]:
        with alone(self._trainer, Silent()) if self._ranks.world > 1 else nullcontext():
            yield

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        trace = self._make_scope(thorough=True)
        trace.open()
        try:
            with (
                same_randomness(self._module.device),
                quiet(self._trainer),
                attributes_kept(self._module),
                torch.enable_grad(),
            ):
                yield
        finally:
            trace.undo()

    def rehearsal_batches(self) -> int:
        optimizers = self.guard.learner.optimizers
        can = self.comparable() and self.batch is not None and len(optimizers) == 1 and not self._ranks.sharded
        if not can or (self._ranks.world > 1 and isinstance(optimizers[0], LBFGS)):
            return 0
        counts: list[int] = self._ranks.gather(len(self._at_hand()))
        return min(counts)

    def _at_hand(self) -> list[tuple[Any, int]]:
        if len(self.recent) > 1:
            return list(self.recent)
        # Too few to leave out the one at hand, though it may have a part in the trouble.
        return [*self.recent, (self.batch, self.batch_idx)]

    def train_on(self, index: int) -> float | None:
        optimizer = self.guard.learner.optimizers[0]
        seen: list[float] = []

        def closure() -> float:
            value = self._gradients(optimizer, *self._at_hand()[index])
            if value is None:
                raise _RehearsalError
            self.guard.clip_now(optimizer)
            clip_as_configured(self._trainer, optimizer)
            seen.append(value)
            return value

        try:
            if isinstance(optimizer, LBFGS):
                optimizer.step(closure)  # type: ignore[no-untyped-call]
            else:
                closure()
                optimizer.step()
        except _RehearsalError:
            return None
        return seen[0]

    def _gradients(self, optimizer: Optimizer, batch: Any, batch_idx: int) -> float | None:
        value = None
        try:
            with self._silently():
                value = forward_backward(self._trainer, optimizer, batch, batch_idx)
        except Exception as error:
            # All ranks must learn of it, or those where it went well would wait.
            _logger.debug("NaNGuard: a rate could not be rehearsed: %r", error)
        value = mean(self._ranks, value)
        if value is not None:
            self._average_gradients(optimizer)
        return value

    def gradient_finite(self) -> bool | None:
        optimizers = self.guard.learner.optimizers
        if not self.comparable() or self.batch is None or len(optimizers) != 1 or self._ranks.sharded:
            return None
        optimizer = optimizers[0]
        with self.rehearsing():
            loss = self._gradients(optimizer, self.batch, self.batch_idx)
        found = gradients(p for group in optimizer.param_groups for p in group["params"])
        finite = None if loss is None else math.isfinite(loss) and not suspects(found)
        optimizer.zero_grad(set_to_none=True)
        answers = self._ranks.gather(finite)
        return None if None in answers else all(answers)

    def loss_on(self, index: int) -> float | None:
        batch, batch_idx = self._at_hand()[index]
        value = None
        try:
            with self._silently(), torch.no_grad():
                loss = run_training_step(self._trainer, batch, batch_idx)
                value = None if loss is None else float(loss)
        except Exception as error:
            _logger.debug("NaNGuard: a rate could not be rehearsed: %r", error)
        return mean(self._ranks, value)

    def _average_gradients(self, optimizer: Optimizer) -> None:
        if self._ranks.world == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        if look == "replay" and (not self.comparable() or self._ranks.sharded):
            look = "batch"
        good = good_state(self.guard.ring, evidence, fault.kind) if look == "replay" else None
        if good is not None:
            good = self._ranks.whole(good)  # here, where all ranks come, and not where only some may
        micros = self.tape.of(update)
        finding = self._diagnostician.diagnose(fault, evidence, micros, look, good)
        wanted = self._bundles is not None and look != "nothing" and not self._ranks.sharded
        if self._bundles is not None and wanted and micros and self._bundles.due(fault, finding):
            self._bundles.keep(self._incident(fault, evidence, finding, micros, good), self.clock()[0])
        return finding

    def _incident(
        self,
        fault: Fault,
        evidence: Evidence,
        finding: Finding | None,
        micros: Sequence[Micro],
        good: Snapshot | None,
    ) -> Bundle:
        state = state_of(self._module)
        if good is None and self.guard.ring.certified:
            good = self.guard.ring.certified[0]
        if evidence.undo and good is not None and not good.shared():
            # The update was made already: what it began from is in the last good snapshot, nearly.
            state |= {path[-1]: leaf for path, leaf in good.leaves.items() if path[0] in ("parameter", "buffer")}
        return Bundle(
            module=f"{type(self._module).__module__}:{type(self._module).__qualname__}",
            hparams=dict(self._module.hparams),
            fault=fault,
            evidence=evidence,
            finding=finding,
            batches=micros,
            state=state,
            precision=str(self._trainer.precision),
            loss_scale=self._loss_scale(),
        )

    def _rerun(self, micro: Micro, full_precision: bool) -> Tensor | None:
        self.tape.rewind(micro)
        return loss_with_graph(self._trainer, micro.batch, micro.index, full_precision=full_precision)

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        trace = self._make_scope(thorough=True)
        trace.open()
        try:
            with (
                self._again(),
                attributes_kept(self._module),
                torch.enable_grad(),
            ):
                yield
        finally:
            trace.undo()

    def preflight(self, batch: Any) -> None:
        self.preflight_due = False
        look = Preflight(
            self._module, partial(loss_with_graph, self._trainer, batch_idx=self.batch_idx), self._untraced
        )
        run = self.comparable() and self._trainer.world_size == 1 and batch is not None
        for finding in look.look(batch, readable_loader(self._trainer, self._module), run=run):
            if finding.confidence > LOW:
                self.advise("preflight", finding)

    def examine_if_due(self) -> None:
        trend, asked = self.guard.trend(), self.examination_due
        course = None if trend is None else self._examination.due(self.guard.updates, trend, asked=asked)
        if trend is None or course is None:
            return
        self.examination_due = False
        if not self.comparable() or self._trainer.world_size > 1:
            return
        rates = self.guard.rate.effective()
        evidence = Evidence(
            step=self.guard.updates, first=course.first, scale=trend.scale(), lr=rates[0] if rates else None
        )
        for finding in self._examination.findings(self.tape.newest(256), course, evidence, asked=asked):
            if finding.confidence > LOW:
                self.advise("asked" if asked else "loss does not move", finding)

    def advise(self, occasion: str, finding: Finding) -> None:
        global_step, epoch, _ = self.clock()
        self._adviser.give(Advice(global_step, epoch, occasion, finding))

    def _loss_scale(self) -> float | None:
        scaler = grad_scaler(self._trainer)
        return None if scaler is None else float(scaler.get_scale())

    def record(self, intervention: Intervention) -> None:
        self._journal.write(intervention)

    # Validation

    def see_validation(self, outputs: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._validation_bad = bad if self._validation_bad is None else self._validation_bad | bad

    def judge_validation(self) -> None:
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
        batch_idx, self.batch_idx = self.batch_idx, -1
        message = f"the {mine} is not finite while the training loss is"
        self.guard.report(Fault("non_finite_validation", "state", mine, None, message))
        self.batch_idx = batch_idx


@final
class _Call(Sink):
    """Hands records to the user's function."""

    def __init__(self, function: Callable[[Intervention], Any]) -> None:
        self._function = function

    def write(self, intervention: Intervention) -> None:
        self._function(intervention)

    def close(self) -> None:
        pass


@final
class _Loggers(Sink):
    """Numbers to every logger of the trainer, and to the progress bar."""

    def __init__(self, trainer: Trainer, callback: NaNGuard, module: LightningModule) -> None:
        self._trainer = trainer
        self._callback = callback
        self._module = module

    def write(self, intervention: Intervention) -> None:
        run = self._callback._run
        assert run is not None
        count = float(self._callback._memory.total)
        values: dict[str, float] = {
            "nanguard/interventions": count,
            "nanguard/lr_multiplier": run.guard.rate.ratio(),
        }
        norm, clip = run.guard.usual_norm(), run.guard.clip_val
        if norm is not None:
            values["nanguard/grad_norm"] = norm
        if clip is not None:
            values["nanguard/clip_val"] = clip
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=logged_at(self._trainer))
        if run.in_batch:
            self._module.log("nanguard", count, prog_bar=True, logger=False, rank_zero_only=True)

    def close(self) -> None:
        pass


def _nothing() -> None:
    pass


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _instances(name: str, given: Sequence[Any] | None, kind: type[Any], default: Callable[[], Any]) -> tuple[Any, ...]:
    if given is None:
        return tuple(default())
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"NaNGuard({name}={given!r}): expected a list of {kind.__name__} instances.")
    for item in given:
        if not isinstance(item, kind):
            hint = f"; write {item.__name__}()" if isinstance(item, type) else ""
            raise TypeError(f"NaNGuard({name}=…): {item!r} is not an instance of {kind.__name__}{hint}.")
    return tuple(given)


def _deferred(readback: str, trainer: Trainer, module: LightningModule) -> bool:
    if readback != "auto":
        return readback == "deferred"
    fused = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
    return module.device.type == "cuda" and fused and grad_scaler(trainer) is None


def _records(trainer: Trainer, dirpath: Path | None) -> Path:
    folder = dirpath if dirpath is not None else Path(trainer.log_dir or trainer.default_root_dir) / "nanguard"
    return folder / "interventions.jsonl"
