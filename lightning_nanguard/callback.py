"""NaNGuard: Lightning's hooks translated for the :class:`~lightning_nanguard.engine.Guard`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.defaults import default_remedies, executors
from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.checkpoints.resume_gate import ResumeGate
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.diagnosis.bundle import Bundles, safetensors
from lightning_nanguard.errors import TrainingDivergedError, require
from lightning_nanguard.guard.guard import Settings
from lightning_nanguard.record.advice import AdviceLog
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.console import Console
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.summary import summary
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.trainer.fit import Run
from lightning_nanguard.trainer.private.averages import swaps_weights
from lightning_nanguard.trainer.private.callbacks import put_first
from lightning_nanguard.trainer.private.packages import (
    GuardCallback,
    LightningModule,
    Trainer,
    logged_at,
    rank_zero_info,
)
from lightning_nanguard.trainer.private.precision import grad_scaler
from lightning_nanguard.trainer.private.resuming import before_resuming
from lightning_nanguard.trainer.private.strategies import check_strategy
from lightning_nanguard.types import Advice, Fault, Intervention

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
        snapshot_every_n_steps: Updates between snapshots of the learner; ``"auto"`` keeps them at 1 % of the run's
            time at most, and at less and less as a run goes on without a fault.
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
        self._gate: ResumeGate | None = None
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
        self._run: Run | None = None
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
        self._running().inquiry.asked = True

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the first place among the callbacks, and look at the checkpoint that is gone on from.

        Raises:
            ValueError: When the strategy is not supported.
        """
        if stage == "fit":
            check_strategy(trainer, pl_module)
            put_first(trainer, self)
            self._undo_gate()
            folders = [] if self._dirpath is None else [self._dirpath]
            self._gate = ResumeGate(pl_module, folders, take=self._resume == "last-good", observe=self._observe)
            self._undo_gate = before_resuming(trainer, self._gate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the guard of this fit and look at the state before the first update."""
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise ValueError(
                f"NaNGuard has nothing to guard: {type(pl_module).__name__} has no trainable parameter. "
                "Set requires_grad on the parameters to train, or take the guard out of the callbacks."
            )
        self._run = Run(
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
            journal=SinkDispatcher(self._sinks(trainer, pl_module)),
            adviser=self._adviser(trainer),
            examine_after=self._examine_after,
            bundles=Bundles(self._bundle_dir) if self._bundle_dir is not None and trainer.is_global_zero else None,
        )
        self._run.inquiry.preflight_due = self._preflight and trainer.global_step == 0
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
        run = self._run or self._running()
        guard, stage = run.guard, run.stage
        stage.batch, stage.batch_idx = batch, batch_idx
        if run.inquiry.preflight_due:
            run.inquiry.preflight(batch)
        stage.tape.add(guard.updates + 1, batch_idx, batch)
        guard.open_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the loss."""
        (self._run or self._running()).guard.see_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, detect, and block a bad update."""
        run = self._run or self._running()
        optimizer_index = run.optimizer_index(optimizer)
        if optimizer_index is not None:
            run.guard.before_step(optimizer_index)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide, act, record; certify and take snapshots."""
        run = self._run or self._running()
        guard, stage = run.guard, run.stage
        stage.batch, stage.batch_idx = batch, batch_idx
        run.in_batch = True
        if run.last_good is not None and run.last_good.due(guard.updates):
            guard.want_snapshot()
        try:
            if guard.close_batch():
                stage.remember(guard.updates)
            else:
                stage.distrust(guard.updates)
            run.inquiry.examine_if_due()
        finally:
            run.in_batch = False
            stage.batch = None
            if not guard.in_window:
                stage.tape.clear()

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

    def _running(self) -> Run:
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

    def _adviser(self, trainer: Trainer) -> AdviceLog:
        path = _records(trainer, self._dirpath).with_name("advice.jsonl")
        adviser = AdviceLog(JsonLines(path) if trainer.is_global_zero else None)
        self._advice = adviser.given
        return adviser


@final
class _Call(Sink):
    """RemedyActions records to the user's function."""

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
        if run.in_batch and self._trainer.progress_bar_callback is not None:
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
    fused = all(map(skips_on_device, trainer.optimizers))
    return module.device.type == "cuda" and fused and grad_scaler(trainer) is None


def _records(trainer: Trainer, dirpath: Path | None) -> Path:
    folder = dirpath if dirpath is not None else Path(trainer.log_dir or trainer.default_root_dir) / "nanguard"
    return folder / "interventions.jsonl"
