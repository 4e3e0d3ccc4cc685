"""The guard: it owns the order of a step, the queue of readings, certification and state. It knows no Trainer.

A loop calls, in this order::

    guard.start()
    for batch in data:
        guard.open_batch()          # before the batch touches anything
        guard.see_loss(loss)        # for every backward
        guard.before_step(0)        # gradients are there, unscaled and unclipped; the optimizer steps next
        guard.close_batch()         # after the optimizer and the schedulers
    guard.finish()
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_nanguard.batch_scope import BatchScope
from lightning_nanguard.detectors import Detector, Trend
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.events import Fault, Intervention, Plan, PlanStep, Reading, Restore, Skip, Stop
from lightning_nanguard.learning_rate import LearningRate
from lightning_nanguard.measure import PendingReading, exact_norm, gradients, pend, suspects
from lightning_nanguard.policy import Comparison, Evidence, Policy, PolicyState
from lightning_nanguard.remedies import ClipGradients, ReduceLR, Remedy, executors
from lightning_nanguard.snapshot import (
    Learner,
    Path,
    Ring,
    Snapshot,
    allowances,
    capture,
    corrupt,
    restore,
)


class Host(Protocol):
    """What the guard asks of the loop around it."""

    def clock(self) -> tuple[int, int, int]:
        """``global_step``, epoch and batch index of now."""

    def micro_batches(self) -> int:
        """By how many micro-batches the loss is divided."""

    def batch_finite(self) -> bool | None:
        """Whether the batch at hand is finite; ``None`` where it holds no floating numbers or is not at hand."""

    def probe(self) -> float | None:
        """Loss of the batch at hand under the weights of now, leaving no trace; ``None`` where it cannot be had."""

    def record(self, intervention: Intervention) -> None:
        """Keep what was done."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the guard works, apart from detectors and remedies.

    Attributes:
        snapshot_every: Updates between snapshots; ``None`` chooses so that they take at most 1 % of the time.
        snapshot_device: Where snapshots lie; ``None`` beside the originals.
        deferred: Read late, without waiting for the device.
        observe: Record what would be done, change nothing.
    """

    snapshot_every: int | None = None
    snapshot_device: torch.device | None = None
    deferred: bool = False
    observe: bool = False


# Healthy updates within which a reading must be read in deferred readback.
_MAX_DELAY = 2
# A state that no detector objects to, but that is uneasy, is certified after this many readings all the same.
_CERTIFY_ANYWAY = 100
_FIRST_INTERVAL = 16
_LONGEST_INTERVAL = 1024
_SHARE = 0.01


@final
class Guard:
    """One run's guard.

    Args:
        learner: What is trained.
        rate: The learning rate's multiplier.
        scope: What a batch may touch.
        host: The loop around.
        detectors: Asked in this order, one copy for each optimizer.
        remedies: What may follow when skipping is not enough, in order of preference.
        policy: Decides.
        ring: Keeps snapshots.
        settings: The rest.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        rate: LearningRate,
        scope: BatchScope,
        host: Host,
        detectors: Sequence[Detector],
        remedies: Sequence[Remedy],
        policy: Policy,
        ring: Ring,
        settings: Settings,
    ) -> None:
        self.learner = learner
        self.rate = rate
        self.policy = policy
        self.ring = ring
        self.settings = settings
        self._scope = scope
        self._host = host
        self._prototypes = tuple(detectors)
        self._executors = executors(remedies)
        self._remedies = tuple(remedies)
        self._detectors: dict[int, list[Detector]] = {}
        self._trends: dict[int, Trend] = {}
        self._policy_state = PolicyState()
        self._clip: tuple[float, Literal["norm", "value"]] | None = None
        self._clip_since = 0
        self._step = 0
        self._healthy_steps = 0
        self._healthy_since_restore: int | None = None
        self._bad_in_a_row = 0
        self._tried: deque[str] = deque(maxlen=5)
        # What belongs to the batch at hand.
        self._open = False
        self._losses: list[Tensor] = []
        self._readings: list[Reading] = []
        self._found: tuple[Fault, Reading, bool] | None = None
        self._blocked: set[int] = set()
        self._kept: dict[int, Snapshot] = {}
        self._updated = False
        self._queue: deque[PendingReading] = deque()
        self._restored_to: int | None = None
        # What belongs to the run.
        self._allowed: dict[Path, Tensor] = {}
        self._initial_norms: dict[str, float] = {}
        self._interval = settings.snapshot_every or _FIRST_INTERVAL
        self._last_capture = 0
        self._capture_seconds = 0.0
        self._mark = 0.0

    # ------------------------------------------------------------------------------------------------ the order of a step

    def start(self) -> None:
        """Look at the state before the first update and keep it.

        Raises:
            TrainingDivergedError: When a parameter is not finite.
        """
        parameters = [(path, leaf) for path, leaf in self.learner.weights() if path[0] == "parameter"]
        bad = corrupt(parameters, {})
        if bad is not None:
            raise TrainingDivergedError(
                f"{bad} holds NaN or Inf before the first update, so there is no good state to guard. Look at how it "
                "was initialised, or at the checkpoint it came from, and start again."
            )
        self._allowed = allowances(self.learner.weights())
        self._initial_norms = {
            path[1]: float(torch.linalg.vector_norm(leaf.detach().float()))
            for path, leaf in parameters
            if leaf.dim() >= 2
        }
        self._capture()
        assert self.ring.pending is not None
        # The start is good once its first loss is.
        self.ring.pending.healthy = self.ring.certify_after - 1
        self._mark = time.perf_counter()

    def open_batch(self) -> None:
        """Remember what the coming batch may touch; a window of accumulation counts as one batch."""
        if self._open:
            return
        self._open = True
        self._scope.open()
        for index, optimizer in enumerate(self.learner.optimizers):
            if isinstance(optimizer, LBFGS):
                # It changes its state and the weights between the closures of one step: keep both from before it.
                leaves = [*self.learner.weights(), *self.learner.optimizer_leaves(index)]
                self._kept[index] = self._copy(leaves, self._kept.get(index))

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one backward, as it is given to it."""
        self._losses.append(loss.detach())

    def before_step(self, stream: int) -> None:
        """Measure and detect; block the update where it is bad.

        Args:
            stream: Index of the optimizer about to step.
        """
        optimizer = self.learner.optimizers[stream]
        pending = self._measure(stream, optimizer)
        self._losses = []
        self._updated = True
        if pending is None:
            return
        if self._found is not None and not self.settings.observe:
            # A fault of this batch is waiting to be acted on: nothing more reaches the weights before.
            self._block(stream, optimizer)
            return
        if not self.settings.deferred:
            self._detect(pending.read(lambda: self._confirm(optimizer)), optimizer, reached=False)
            if stream not in self._blocked:
                self._clip_gradients(optimizer, pending)
            return
        self._defer(pending, optimizer)
        self._read_arrived(optimizer)
        if stream not in self._blocked:
            self._clip_gradients(optimizer, pending)

    def close_batch(self) -> None:
        """Decide, act and record; else certify and take snapshots.

        Raises:
            TrainingDivergedError: When the run cannot be helped.
        """
        if not self._updated:
            return  # within a window of accumulation
        self._drop_flags()
        found, self._found = self._found, None
        try:
            if found is not None:
                self._handle(*found)
            elif self._readings:
                self._healthy()
        finally:
            self._open = False
            self._updated = False
            self._readings = []
            self._blocked.clear()

    def report(self, fault: Fault) -> None:
        """Take a fault that was found outside a step, such as in validation; acts at once."""
        reading = Reading(self._step, 0, None, None)
        self._handle(fault, reading, False)

    def flush(self) -> None:
        """Read what is still on its way, and act on it."""
        while self._queue:
            self._detect(self._queue.popleft().read(), None, reached=True)
            if self._found is not None:
                break
        if self._found is not None:
            found, self._found = self._found, None
            self._handle(*found)

    # ------------------------------------------------------------------------------------------------ measure

    def _measure(self, stream: int, optimizer: Optimizer) -> PendingReading | None:
        self._step += 1
        values = gradients(p for group in optimizer.param_groups for p in group["params"])
        scaler = self.learner.scaler
        factor = self._host.micro_batches() / len(self._losses) if self._losses else 1.0
        return pend(
            step=self._step,
            stream=stream,
            losses=self._losses,
            loss_factor=factor,
            values=values,
            loss_scale=_scale_of(scaler),
            gradients_scaled=scaler is not None and _unscales_itself(optimizer),
        )

    def _confirm(self, optimizer: Optimizer) -> float | None:
        values = gradients(p for group in optimizer.param_groups for p in group["params"])
        return None if suspects(values) else exact_norm(values)

    def _defer(self, pending: PendingReading, optimizer: Optimizer) -> None:
        if self.learner.scaler is None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Fused optimizers leave their state alone where this flag is set: decided without the host.
            optimizer.found_inf = (~torch.isfinite(pending.values[:2]).all()).to(torch.float32)  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            pending.held_back = True
        pending.send()
        self._queue.append(pending)

    def _drop_flags(self) -> None:
        for optimizer in self.learner.optimizers:
            for name in ("found_inf", "grad_scale"):
                if name in vars(optimizer):
                    delattr(optimizer, name)

    def _read_arrived(self, optimizer: Optimizer) -> None:
        while self._queue and (self._queue[0].step <= self._step - _MAX_DELAY or self._queue[0].arrived()):
            pending = self._queue.popleft()
            self._detect(pending.read(), optimizer, reached=not pending.held_back)
            if self._found is not None:
                return

    # ------------------------------------------------------------------------------------------------ detect

    def _detect(self, reading: Reading, optimizer: Optimizer | None, *, reached: bool) -> None:
        if self.learner.scaler is not None and not reading.finite and reading.loss_finite:
            reading = replace(reading, scaler_skips=True)
        detectors = self._detectors.get(reading.stream)
        if detectors is None:
            detectors = self._detectors[reading.stream] = [copy.deepcopy(d) for d in self._prototypes]
            self._trends[reading.stream] = Trend()
        fault = next((fault for detector in detectors if (fault := detector.check(reading)) is not None), None)
        if fault is None:
            self._accept(reading)
            return
        if fault.place == "gradient" and optimizer is not None and not reading.finite and not reached:
            fault = replace(fault, place=self._bad_gradient(optimizer))
        self._found = (fault, reading, reached and fault.scope == "batch")
        if fault.scope == "learner" and not reading.scaler_skips:
            return  # a suspicion: the update is finite, and a restore would rewind it with the rest
        if optimizer is not None and not self.settings.observe and not (self.settings.deferred and not reached):
            self._block(reading.stream, optimizer)

    def _accept(self, reading: Reading) -> None:
        for detector in self._detectors[reading.stream]:
            detector.accept(reading)
        self._trends[reading.stream].accept(reading)
        self._readings.append(reading)

    def _bad_gradient(self, optimizer: Optimizer) -> str:
        names = self.learner.parameter_names()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = suspects(gradients(parameters))
        return f"gradient of {names.get(id(parameters[bad[0]]), 'a parameter')}" if bad else "gradient"

    def _block(self, stream: int, optimizer: Optimizer) -> None:
        self._blocked.add(stream)
        if stream not in self._kept and not type(optimizer).__module__.startswith("torch.optim"):
            # It may count steps in its groups even without gradients.
            self._kept[stream] = self._copy([*self.learner.optimizer_leaves(stream)], None)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.learner.scaler is not None and _unscales_itself(optimizer):
            # This scaler insists on gradients, and skips the step by itself when it finds one that is not finite.
            if parameters and parameters[0].grad is not None:
                parameters[0].grad.fill_(math.inf)
            return
        for parameter in parameters:
            parameter.grad = None

    # ------------------------------------------------------------------------------------------------ decide

    def _handle(self, fault: Fault, reading: Reading, reached: bool) -> None:
        if fault.scope == "batch":
            self._bad_in_a_row += 1
        evidence = self._look_into(fault, reading, reached)
        plan, state = self.policy.decide(fault, evidence, self._policy_state)
        if not plan:
            for detector in self._detectors.get(reading.stream, ()):
                detector.dismiss(reading)
            if reading.stream in self._detectors and reading.loss is not None:
                self._accept(reading)
            return
        self._policy_state = state
        if fault.scope == "learner":
            self._bad_in_a_row += 1
        self._act(fault, reading, evidence, plan)

    def _look_into(self, fault: Fault, reading: Reading, reached: bool) -> Evidence:
        bad = corrupt(self.learner.leaves(), self._allowed)
        trend = self._trends.get(reading.stream, Trend())
        batch_finite = self._host.batch_finite() if not reached else None
        target = self._target()
        rates = self.rate.effective()
        return Evidence(
            step=self._step,
            healthy_steps=self._healthy_steps,
            healthy_since_restore=self._healthy_since_restore,
            bad_in_a_row=max(1, self._bad_in_a_row),
            corrupt=bad,
            batch_finite=batch_finite,
            comparison=self._compare(fault, reading, target, batch_finite, bad) if not reached else None,
            loss_scale_of_first=trend.scale(),
            growth=self._growth(),
            climbing=trend.climbing(),
            rate_rose=_rose(rates[0] if rates else None, target.rate if target is not None else None),
            snapshots=len(self.ring.certified),
            levels=tuple(snapshot.level for snapshot in self.ring.certified),
            usual_norm=trend.usual_norm(),
            lr=rates[0] if rates else None,
            multiplier=self.rate.multiplier,
            undo=reached,
        )

    def _target(self) -> Snapshot | None:
        """The newest certified snapshot whose loss was about the best."""
        known = [snapshot.level for snapshot in self.ring.certified if snapshot.level is not None]
        limit = min(known, default=0.0) + 0.25 * max((trend.scale() for trend in self._trends.values()), default=0.0)
        for snapshot in self.ring.certified:
            if snapshot.level is None or snapshot.level <= limit:
                return snapshot
        return None

    def _compare(
        self, fault: Fault, reading: Reading, target: Snapshot | None, batch_finite: bool | None, bad: str | None
    ) -> Comparison | None:
        if target is None or self.settings.observe or batch_finite is False or reading.loss is None or bad is not None:
            return None
        now = self._host.probe() if fault.scope == "learner" else reading.loss
        if now is None:
            return None
        try:
            mine = self._copy([*self.learner.weights()], None)
        except torch.OutOfMemoryError:
            return None
        weights = _is_weight
        restore(self.learner, target, keep=weights)
        try:
            then = self._host.probe()
        finally:
            restore(self.learner, mine, keep=weights)
        return None if then is None else Comparison(now, then)

    def _growth(self) -> float:
        largest = 1.0
        for path, leaf in self.learner.weights():
            start = self._initial_norms.get(path[1], 0.0) if path[0] == "parameter" else 0.0
            if start > 0:
                largest = max(largest, float(torch.linalg.vector_norm(leaf.detach().float())) / start)
        return largest

    # ------------------------------------------------------------------------------------------------ act

    def _act(self, fault: Fault, reading: Reading, evidence: Evidence, plan: Plan) -> None:
        before = self.rate.effective()
        stop = next((step for step in plan if isinstance(step, Stop)), None)
        self._restored_to = None
        if not self.settings.observe:
            if not any(isinstance(step, Skip) for step in plan):
                self.skip()  # a restore, too, leaves nothing of the batch behind
            if stop is not None and self.ring.certified:
                self.restore(0)
            for step in plan:
                self._executors[type(step)].apply(step, self)
        words = tuple(self._executors[type(step)].word for step in plan)
        after = self.rate.effective()
        place = evidence.corrupt if evidence.corrupt is not None else fault.place
        self._record(fault, place, words, before, after, _cause(evidence))
        self._tried.append(f"{fault.kind}: {', '.join(words)}")
        if stop is not None and not self.settings.observe:
            self._stop(fault, place, stop.reason)

    def _stop(self, fault: Fault, place: str, reason: str) -> None:
        global_step, epoch, batch_idx = self._host.clock()
        tried = list(self._tried)[:-1]
        good = (
            f"The module holds the last good weights, those of step {self._restored_to}."
            if self._restored_to is not None
            else "There is no good state to go back to."
        )
        raise TrainingDivergedError(
            f"Training cannot go on: {reason}. At step {global_step} (epoch {epoch}, batch {batch_idx}) {fault.message} "
            f"({fault.kind}, {place}). Tried before: {'; '.join(tried) or 'nothing'}. {good} {_ADVICE}",
            fault=fault,
            reason=reason,
            tried=tried,
            snapshot_step=self._restored_to,
        )

    def skip(self) -> None:
        """Undo what the batch touched; part of :class:`~lightning_nanguard.remedies.Patient`."""
        self._scope.undo()
        for stream in self._blocked:
            kept = self._kept.get(stream)
            if kept is not None:
                restore(self.learner, kept, keep=lambda path, own=stream: _is_weight(path) or path[1] == own)
                if not isinstance(self.learner.optimizers[stream], LBFGS):
                    del self._kept[stream]

    def restore(self, depth: int) -> None:
        """Go back to a certified snapshot; part of :class:`~lightning_nanguard.remedies.Patient`."""
        self.ring.drop_pending()
        snapshot = self.ring.discard_newer(depth)
        restore(self.learner, snapshot)
        self._restored_to = snapshot.global_step
        self._healthy_since_restore = 0
        self._last_capture = self._step
        self._queue.clear()
        for stream, detectors in self._detectors.items():
            self._trends[stream].rewind(snapshot.step)
            for detector in detectors:
                detector.rewind(snapshot.step)
        for optimizer in self.learner.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def scale(self, factor: float, min_lr: float) -> None:
        """Multiply the learning rate; part of :class:`~lightning_nanguard.remedies.Patient`."""
        self.rate.set_multiplier(min(1.0, self.rate.multiplier * factor), min_lr=min_lr)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip from now on; part of :class:`~lightning_nanguard.remedies.Patient`."""
        tighter = value if self._clip is None or self._clip[1] != algorithm else min(value, self._clip[0])
        self._clip = (tighter, algorithm) if math.isfinite(value) else None
        self._clip_since = self._healthy_steps

    def drop_moments(self) -> None:
        """Empty the optimizers' state; part of :class:`~lightning_nanguard.remedies.Patient`."""
        for optimizer in self.learner.optimizers:
            optimizer.state.clear()

    def _clip_gradients(self, optimizer: Optimizer, pending: PendingReading) -> None:
        if self._clip is None or self.settings.observe or not pending.has_gradient:
            return
        value, algorithm = self._clip
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.learner.scaler is not None and _unscales_itself(optimizer):
            value = value * float(_scale_of(self.learner.scaler) or 1.0)
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_([p for g in optimizer.param_groups for p in g["params"]], value)
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        factor = torch.clamp(value / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].device))

    # ------------------------------------------------------------------------------------------------ healthy

    def _healthy(self) -> None:
        self._bad_in_a_row = 0
        if all(reading.scaler_skips for reading in self._readings):
            return  # the scaler skipped it: nothing was learned about the state
        self._healthy_steps += 1
        if self._healthy_since_restore is not None:
            self._healthy_since_restore += 1
        self._certify()
        if self.ring.pending is None and self._step - self._last_capture >= self._interval:
            self._timed_capture()
        self._give_back()

    def _certify(self) -> None:
        if not self.ring.healthy():
            return
        pending = self.ring.pending
        assert pending is not None
        uneasy = any(
            detector.uneasy(reading) for reading in self._readings for detector in self._detectors[reading.stream]
        )
        if uneasy and pending.healthy < _CERTIFY_ANYWAY:
            return
        bad = corrupt(pending.leaves.items(), self._allowed)
        if bad is not None:
            self.ring.drop_pending()
            message = f"{bad} is no longer finite, though every loss and gradient is"
            self._handle(Fault("corrupted_state", "state", bad, None, message), self._readings[-1], False)
            return
        pending.level = self._trends[self._readings[0].stream].level()
        self.ring.certify()

    def _timed_capture(self) -> None:
        now = time.perf_counter()
        updates = max(1, self._step - self._last_capture)
        seconds = (now - self._mark) / updates
        self._capture()
        self._mark = time.perf_counter()
        if self.settings.snapshot_every is None and seconds > 0:
            # Powers of two with the smaller of two readings: a slow moment must not set the pace.
            spent = self._mark - now
            self._capture_seconds = min(spent, self._capture_seconds) if self._capture_seconds else spent
            wanted = self._capture_seconds / (_SHARE * seconds)
            power = 1 << max(0, math.ceil(math.log2(max(wanted, 1e-9))))
            self._interval = min(max(_FIRST_INTERVAL, power), _LONGEST_INTERVAL)

    def _capture(self) -> None:
        global_step, _, _ = self._host.clock()
        snapshot = capture(
            self.learner,
            step=self._step,
            global_step=global_step,
            device=self.settings.snapshot_device,
            reuse=self.ring.spare(),
        )
        rates = self.rate.effective()
        snapshot.rate = rates[0] if rates else None
        self.ring.add(snapshot)
        self._last_capture = self._step

    def _copy(self, leaves: list[tuple[Path, Any]], reuse: Snapshot | None) -> Snapshot:
        return capture(self.learner, step=self._step, global_step=0, reuse=reuse, leaves=iter(leaves))

    def _give_back(self) -> None:
        reduce = self._executors[_step_type(ReduceLR)]
        if self.rate.multiplier < 1.0 and isinstance(reduce, ReduceLR) and not self.settings.observe:
            scheduled = self.rate.scheduled()
            evidence = Evidence(self._step, healthy_steps=self._healthy_steps, multiplier=self.rate.multiplier)
            plan, self._policy_state = self.policy.give_back(
                evidence, scheduled[0] if scheduled else None, reduce.factor, reduce.recover_after, self._policy_state
            )
            self._carry_out_return(plan, reduce.min_lr)
        clip = self._executors[_step_type(ClipGradients)]
        if (
            self._clip is not None
            and isinstance(clip, ClipGradients)
            and self._healthy_steps - self._clip_since >= clip.recover_after
        ):
            before = self.rate.effective()
            self.clip(math.inf, self._clip[1])
            self._record(_HEALTHY, "", ("end clip",), before, before, None)

    def _carry_out_return(self, plan: Plan, min_lr: float) -> None:
        for step in plan:
            before = self.rate.effective()
            self.scale(_factor(step), min_lr)
            self._record(_HEALTHY, "", ("give back",), before, self.rate.effective(), None)

    def _record(
        self,
        fault: Fault,
        place: str,
        words: tuple[str, ...],
        before: list[float],
        after: list[float],
        cause: str | None,
    ) -> None:
        global_step, epoch, batch_idx = self._host.clock()
        self._host.record(
            Intervention(
                global_step=global_step,
                epoch=epoch,
                batch_idx=batch_idx,
                fault=fault.kind,
                place=place,
                remedies=words,
                lr_before=before[0] if before else None,
                lr_after=after[0] if after else None,
                snapshot_step=self._restored_to if "restore" in words or "stop" in words else None,
                cause=cause,
                message=fault.message,
                value=fault.value,
                applied=not self.settings.observe,
            )
        )

    # ------------------------------------------------------------------------------------------------ state

    @property
    def clip_val(self) -> float | None:
        """The clipping value in force, ``None`` without one."""
        return None if self._clip is None else self._clip[0]

    @property
    def updates(self) -> int:
        """Attempted updates so far."""
        return self._step

    def usual_norm(self) -> float | None:
        """Median of the healthy gradient norms of the first optimizer."""
        trend = self._trends.get(0)
        return trend.usual_norm() if trend is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped, in plain containers."""
        state = self._policy_state
        return {
            "step": self._step,
            "healthy_steps": self._healthy_steps,
            "healthy_since_restore": self._healthy_since_restore,
            "bad_in_a_row": self._bad_in_a_row,
            "clip": list(self._clip) if self._clip is not None else None,
            "clip_since": self._clip_since,
            "rate": self.rate.state_dict(),
            "initial_norms": dict(self._initial_norms),
            "policy": {
                "attempt": state.attempt,
                "learner_step": state.learner_step,
                "restores": [list(item) for item in state.restores],
                "skips": list(state.skips),
                "bad_rate": state.bad_rate,
                "failed_returns": state.failed_returns,
                "given_back_at": state.given_back_at,
            },
            "streams": {
                str(stream): {
                    "trend": self._trends[stream].state_dict(),
                    "detectors": [[type(d).__qualname__, d.state_dict()] for d in detectors],
                }
                for stream, detectors in self._detectors.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it before :meth:`start`."""
        self._step = int(state["step"])
        self._healthy_steps = int(state["healthy_steps"])
        since = state["healthy_since_restore"]
        self._healthy_since_restore = None if since is None else int(since)
        self._bad_in_a_row = int(state["bad_in_a_row"])
        clip = state["clip"]
        self._clip = None if clip is None else (float(clip[0]), clip[1])
        self._clip_since = int(state["clip_since"])
        self.rate.load_state_dict(state["rate"])
        policy = state["policy"]
        self._policy_state = PolicyState(
            attempt=int(policy["attempt"]),
            learner_step=int(policy["learner_step"]),
            restores=tuple((int(step), str(place)) for step, place in policy["restores"]),
            skips=tuple(int(step) for step in policy["skips"]),
            bad_rate=float(policy["bad_rate"]),
            failed_returns=int(policy["failed_returns"]),
            given_back_at=int(policy["given_back_at"]),
        )
        for stream, saved in state["streams"].items():
            trend = self._trends[int(stream)] = Trend()
            trend.load_state_dict(saved["trend"])
            detectors = self._detectors[int(stream)] = [copy.deepcopy(d) for d in self._prototypes]
            # A configuration may have changed: a detector takes up its history where its class is still listed.
            by_name = {name: history for name, history in saved["detectors"]}
            for detector in detectors:
                if type(detector).__qualname__ in by_name:
                    detector.load_state_dict(by_name[type(detector).__qualname__])


_HEALTHY = Fault("healthy_stretch", "learner", "", None, "a long healthy stretch")
_ADVICE = (
    "Look at the records of the interventions before this one; lower the learning rate, look at the data named there, "
    "or widen the budget if the run should have gone on."
)


def _cause(evidence: Evidence) -> str | None:
    if evidence.batch_finite is False:
        return "non_finite_input"
    return None


def _step_type(remedy: type[Remedy]) -> type[PlanStep]:
    return remedy.step


def _factor(step: PlanStep) -> float:
    factor: float = getattr(step, "factor", 1.0)
    return factor


def _is_weight(path: Path) -> bool:
    return path[0] in ("parameter", "buffer")


def _rose(now: float | None, then: float | None) -> bool:
    return now is not None and then is not None and now > 1.5 * then


def _unscales_itself(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _scale_of(scaler: Any) -> Tensor | None:
    # The tensor itself: get_scale() reads from the device.
    return None if scaler is None else getattr(scaler, "_scale", None)
