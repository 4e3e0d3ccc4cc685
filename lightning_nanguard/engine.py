"""The guard: it owns the order of a step and knows no Trainer.

A loop calls, in this order::

    guard.start()
    for batch in data:
        guard.open_batch()          # before the batch touches anything
        guard.see_loss(loss)        # for every backward
        guard.before_step(0)        # gradients are there, unscaled and unclipped; the optimizer steps next
        guard.close_batch()         # after the optimizer and the schedulers
    guard.flush()
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_nanguard.batch_scope import BatchScope
from lightning_nanguard.blocking import Blocker, unscales_itself
from lightning_nanguard.checkpoints import mended, poisoned
from lightning_nanguard.clipping import Clipper
from lightning_nanguard.detectors import Detector, NonFinite
from lightning_nanguard.diagnosis.clues import Look
from lightning_nanguard.distributed import Alone, Posted, Ranks, Report, combined, conspicuous, first, surest
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.events import Fault, Finding, Intervention, Plan, Reading, Scale, Skip, Stop
from lightning_nanguard.investigate import Investigator, Witness, matrix_norms
from lightning_nanguard.keeper import Keeper
from lightning_nanguard.learner import Learner, Path
from lightning_nanguard.learning_rate import LearningRate
from lightning_nanguard.measure import PendingReading, exact_norm, gradients, partial_norms, pend, suspects, total_norm
from lightning_nanguard.policy import Evidence, Policy, PolicyState
from lightning_nanguard.rehearsal import Rehearsal, Reviews, Stage
from lightning_nanguard.remedies import ClipGradients, ReduceLR, Remedy, executors
from lightning_nanguard.ring import Ring
from lightning_nanguard.snapshot import Snapshot, corrupt, mend_averages, restore
from lightning_nanguard.trend import Trend


class Host(Witness, Stage, Protocol):
    """What the guard asks of the loop around it."""

    def clock(self) -> tuple[int, int, int]:
        """``global_step``, epoch and batch index of now."""

    def micro_batches(self) -> int:
        """By how many micro-batches the loss is divided."""

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Why the fault of an update happened, ``None`` where that was not found; it changes nothing."""

    def record(self, intervention: Intervention) -> None:
        """Keep what was done."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the guard works, apart from detectors and remedies.

    Attributes:
        snapshot_every: Updates between snapshots; ``None`` chooses so that they take at most 1 % of the time.
        snapshot_device: Where snapshots lie; ``None`` beside the originals.
        choose_place: Whether they go to host memory by themselves where the device has no room.
        deferred: Read late, without waiting for the device.
        observe: Record what would be done, change nothing.
    """

    snapshot_every: int | None = None
    snapshot_device: torch.device | None = None
    choose_place: bool = False
    deferred: bool = False
    observe: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """A fault that waits for the end of its batch.

    Attributes:
        fault: The fault.
        reading: The reading it was found in.
        scope: What its batch may have touched; ``None`` outside a batch.
        reached: Whether the bad update reached the weights.
        late: Whether the batch at hand is another one.
        ranks: Ranks that saw it, where not all did.
    """

    fault: Fault
    reading: Reading
    scope: BatchScope | None
    reached: bool
    late: bool = False
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sent:
    """One update that the other ranks were told about.

    Attributes:
        posted: What all ranks say about it.
        stream: Index of the optimizer.
        scope: What its batch may have touched.
        held_back: Whether the device itself keeps a bad update from the weights.
        trial: Whether it was a further closure of one step.
    """

    posted: Posted
    stream: int
    scope: BatchScope
    held_back: bool
    trial: bool


# Updates after which a reading is waited for in deferred readback.
_MAX_DELAY = 2
# A state that no detector objects to, though one is uneasy about it, is certified after this many readings.
_CERTIFY_ANYWAY = 100

_STALLED = Fault(
    "rate_still_too_high", "learner", "", None, "trials at the rate after a cut made the loss worse than at less"
)
# Healthy updates for which the state of the start is kept: ruin by a rate shows by then.
_EARLY = 1000

_HEALTHY = Fault("healthy_stretch", "learner", "", None, "a long healthy stretch")
_ADVICE = (
    "Look at the records of what was done before; lower the learning rate, look at the data named there, or widen the "
    "budget if the run should have gone on."
)


@final
class Guard:
    """One run's guard.

    Args:
        learner: What is trained.
        rate: The learning rate's multiplier.
        make_scope: Makes an object that remembers what a batch may touch.
        host: The loop around.
        detectors: Asked in this order, one copy for each optimizer.
        remedies: What may follow when skipping is not enough, in order of preference.
        policy: Decides.
        ring: Keeps snapshots.
        settings: The rest.
        ranks: All processes of the run; one by default.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        rate: LearningRate,
        make_scope: Callable[[], BatchScope],
        host: Host,
        detectors: Sequence[Detector],
        remedies: Sequence[Remedy],
        policy: Policy,
        ring: Ring,
        settings: Settings,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks: Ranks = Alone() if ranks is None else ranks
        self._many = self._ranks.world > 1
        self.learner = learner
        self.rate = rate
        self.ring = ring
        self._policy = policy
        self._settings = settings
        self._host = host
        self._rehearsal = Rehearsal(learner, rate, host, self._own_scale, self._ranks)
        self._reviews = Reviews()
        self._investigator = Investigator(
            learner, ring, rate, host, self._rehearsal, compare=not settings.observe, ranks=self._ranks
        )
        self._blocker = Blocker(learner)
        self._clipper = Clipper()
        self._keeper = Keeper(
            learner,
            ring,
            self._investigator,
            every=settings.snapshot_every,
            device=settings.snapshot_device,
            choose=settings.choose_place,
            ranks=self._ranks,
        )
        self._executors = executors(remedies)
        self._prototypes = tuple(detectors)
        self._detectors: dict[int, list[Detector]] = {}
        self._trends: dict[int, Trend] = {}
        self._sent: deque[_Sent] = deque()
        self._outside: Fault | None = None
        self._put_together: Snapshot | None = None
        # In deferred readback, and among ranks, a batch is judged up to two updates later, and must still be undone.
        self._scopes = deque(make_scope() for _ in range(_MAX_DELAY + 2 if settings.deferred or self._many else 1))
        self._queue: deque[tuple[PendingReading, BatchScope]] = deque()
        self._policy_state = PolicyState()
        self.non_finite = 0
        # Whether weights and averages have changed places, as WeightAveraging has them do in validation.
        self.swapped = False
        # Says where a good state lies on the disk, for whoever has to start again.
        self.on_disk: Callable[[], str] = str
        self._step = 0
        self._healthy_steps = 0
        self._healthy_since_restore: int | None = None
        self._bad_in_a_row = 0
        self._clipping_since = 0
        # Step and effective rate, for each step after which the rate of the first group was another.
        self._rates: deque[tuple[int, float]] = deque(maxlen=1024)
        # The clock at the end of the newest batches, with the number of their last update.
        self._clocks: deque[tuple[int, tuple[int, int, int]]] = deque(maxlen=_MAX_DELAY + 2)
        self._tried: deque[str] = deque(maxlen=5)
        # What belongs to the batch at hand, and to the intervention at hand.
        self._open = False
        self._updated = False
        self._losses: list[Tensor] = []
        self._readings: list[Reading] = []
        self._measured: dict[int, int] = {}
        self._found: list[_Found] = []
        self._acting_on: _Found | None = None
        self._restored: Snapshot | None = None
        # Parameters made by the first forward are missing from the start's snapshot until then.
        self._lazy = False

    # ---------------------------------------------------------------------------------------- the order of a step

    def start(self) -> None:
        """Look at the state before the first update and keep it.

        Raises:
            TrainingDivergedError: When a parameter is not finite.
        """
        parameters = [(path, leaf) for path, leaf in self.learner.weights() if path[0] == "parameter"]
        bad, _ = first(self._ranks, corrupt(parameters, {}))
        if bad is not None:
            raise TrainingDivergedError(
                f"{bad} holds NaN or Inf before the first update, so there is no good state to guard. Look at how it "
                "was initialised, or at the checkpoint it came from, and start again."
            )
        self._investigator.begin()
        self._blocker.attach()
        self._keep_start()

    def _keep_start(self) -> None:
        self._lazy = self.learner.lazy()
        if not self._investigator.initial_norms:
            self._investigator.initial_norms = matrix_norms(self.learner.weights())
        self.ring.certified.clear()
        # The start is good once its first loss is.
        self._capture().healthy = self.ring.certify_after - 1

    def open_batch(self) -> None:
        """Remember what the coming batch may touch; a window of accumulation counts as one batch."""
        if not self._open:
            self._open = True
            self._scopes.rotate(1)
            self._scopes[0].open()
            self._blocker.open()

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one backward, as it is given to it."""
        loss = loss.detach()
        # A captured graph writes the next micro-batch's loss to the same place.
        self._losses.append(loss.clone() if self._host.micro_batches() > 1 else loss)

    def before_step(self, stream: int) -> None:
        """Measure and detect; block the update where it is bad.

        Args:
            stream: Index of the optimizer about to step.
        """
        self._keeper.settle()
        if self._many:
            self._hear(stream)
        elif self._settings.deferred:
            self._read_arrived(stream)  # first: what is read late must find its batch's scope
        if self._lazy and not self.learner.lazy():
            self._keep_start()
        pending = self._measure(stream)
        self._losses = []
        self._updated = True
        self._note_rate()
        if pending is None and not self._many:
            return
        if any(one.reached for one in self._found) and not self._settings.observe:
            # The weights are bad already: nothing that comes of them is measured, or reaches them.
            self._blocker.block(stream)
            return
        if pending is None or self._many:
            self._tell(pending, stream)
        elif self._settings.deferred:
            self._defer(pending)
            self._read_arrived(stream)
        else:
            reading = self._read(pending, stream)
            self._detect(reading, self._scopes[0], stream, reached=False, late=False)
            if self._keeper.watches_statistics and not self._found and not self._many:
                self._look_at_statistics(reading)
        norm = self._whole_norm(stream)
        if stream not in self._blocker.blocked and not self._settings.observe:
            optimizer = self.learner.optimizers[stream]
            self._clipper.clip(optimizer, self._loss_scale() if unscales_itself(optimizer) else None, norm)

    def _look_at_statistics(self, reading: Reading) -> None:
        scope = self._scopes[0]
        fault = self._keeper.strange_statistics(scope.before(), self._healthy_steps)
        # What batch after batch brings is how the data are from now on.
        if fault is not None and self._bad_in_a_row < self._policy.patience:
            self._blocker.block(reading.stream)
            self._found.append(_Found(fault, reading, scope, reached=False))

    def close_batch(self) -> bool:
        """Decide, act and record; else certify and take snapshots.

        Returns:
            Whether nothing was found.

        Raises:
            TrainingDivergedError: When the run cannot be helped.
        """
        if not self._updated:
            if self._host.micro_batches() == 1:
                self._open, self._losses = False, []  # a batch without an update, and none to come of it
            return True
        self._drop_flags()
        if self._settings.deferred or self._many:
            self._clocks.append((self._step, self._host.clock()))
        found = self._take_found()
        self._restored = None
        try:
            for one in found:
                self._handle(one)
                if self._restored is not None:
                    break  # what else was found belonged to the state just left
            if self._readings and not found:
                self._healthy()
        finally:
            self._open = self._updated = False
            self._readings = []
            self._measured.clear()
            self._blocker.blocked.clear()
        return not found

    def report(self, fault: Fault) -> None:
        """Take a fault that was found outside a step, such as in validation.

        It is acted on at once; among several ranks, of which this may be the only one that saw it, when all have heard
        of it with the next update.
        """
        if self._many:
            self._outside = fault
        else:
            self._report(fault, ())

    def _report(self, fault: Fault, ranks: tuple[int, ...]) -> None:
        self._handle(_Found(fault, Reading(self._step, 0, None, None), None, reached=False, ranks=ranks))

    def before_save(self) -> None:
        """Look at the state before it is written.

        Within a batch, whose graph needs its tensors as they are, and while averages take the weights' place, nothing
        is changed: :meth:`mend` alone sees to it that what is written is good.
        """
        self._put_together = None
        if not self._open and not self.swapped:
            self.check()
        elif self._many and self.ring.certified:
            # What is written may have to be put together from all ranks, of which later one alone will write.
            bad, _ = first(self._ranks, self._investigator.corrupt(self.learner.leaves()))
            self._put_together = None if bad is None else self._ranks.whole(self.ring.certified[0])

    def want_snapshot(self) -> None:
        """Take a snapshot at the end of this batch, or of the next one that is healthy."""
        self._keeper.want()

    def note(self, fault: Fault, *words: str) -> None:
        """Record what was done outside the order of a step."""
        self._restored = None
        self._record(fault, fault.place, words, self.rate.effective())

    def check(self) -> None:
        """Look at the state of now, and go back to the last good one if it is bad."""
        self.flush()
        bad, ranks = first(self._ranks, self._investigator.corrupt(self.learner.leaves()))
        if bad is None:
            return
        fault = Fault("corrupted_state", "state", bad, None, f"{bad} is no longer finite")
        if self._open and not self._settings.observe:
            # A batch that was broken off may have done no more than spoil batch norm's statistics.
            self._scopes[0].undo()
            if self._investigator.corrupt(self.learner.leaves()) is None:
                self.note(fault, "undo")
                return
        self._readings = []
        self._report(fault, ranks)
        if not self._settings.observe:
            mend_averages(self.learner, self._investigator.corrupt)

    def mend(self, checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        """What to write in the place of a checkpoint: the same, or one with the last good state where it is poisoned.

        The run itself is left alone.

        Args:
            checkpoint: What is about to be written.
            path: Where to, for the record.
            checked: Whether :meth:`before_save` has just been called.
        """
        if self._ranks.rank > 0 and not self._ranks.sharded:
            return checkpoint  # rank 0 writes
        weights = {path[1]: leaf for path, leaf in self.learner.weights()}
        bad = poisoned(checkpoint, weights, self._investigator.allowed)
        told = checked and not self._open and not self.swapped
        if not bad or (self._settings.observe and told):
            return checkpoint
        good = self._good()
        listed = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        message = f"{listed} of a checkpoint about to be written to {path} is not finite"
        self.note(Fault("poisoned_checkpoint", "state", bad[0], None, message), *(("rewrite",) if good else ()))
        return checkpoint if self._settings.observe or good is None else mended(checkpoint, self.learner, good)

    def _good(self) -> dict[Path, Any] | None:
        live = dict(self.learner.leaves())
        if self._investigator.corrupt(live.items()) is None:
            return live
        kept = [*self.ring.certified[:1], *([] if self.ring.pending is None else [self.ring.pending])]
        if self._put_together is not None:
            kept.insert(0, self._put_together)
        kept = [one for one in kept if not one.shared()]
        for one in kept:
            one.wait()
        return next((one.leaves for one in kept if self._investigator.corrupt(one.leaves.items()) is None), None)

    def flush(self) -> None:
        """Read what is still on its way, and act on it."""
        if self._many:
            self._post_queued(0)
            self._hear(None)
        while self._queue or self._found:
            while self._queue and not self._found:
                pending, scope = self._queue.popleft()
                self._detect_late(pending, scope, None)
            for one in self._take_found():
                self._handle(one)

    def _take_found(self) -> list[_Found]:
        found, self._found = self._found, []
        self._bad_in_a_row += any(one.fault.scope == "batch" for one in found)
        return found

    def finish(self) -> None:
        """The last update has been made: look at the state that is left, and read what is still on its way.

        Among several ranks only the latter: where their data are uneven, others never come here.
        """
        if self._many:
            self.flush()
        else:
            self.check()

    def close(self) -> None:
        """Let go of the optimizers."""
        self._drop_flags()
        self._blocker.detach()
        self.rate.detach()
        self._ranks.close()

    def part(self) -> None:
        """This process has raised: among several it is alone from now on, and waits for none of the others."""
        if self._many:
            self._sent.clear()
            self._queue.clear()
            self._ranks.part()

    # ---------------------------------------------------------------------------------------- measure

    def _measure(self, stream: int) -> PendingReading | None:
        self._step += 1
        self._measured[stream] = self._measured.get(stream, 0) + 1
        return pend(
            step=self._step,
            stream=stream,
            losses=self._losses,
            loss_factor=self._host.micro_batches() / len(self._losses) if self._losses else 1.0,
            values=gradients(self._parameters(stream)),
            loss_scale=self._loss_scale(),
            gradients_scaled=unscales_itself(self.learner.optimizers[stream]),
        )

    def _whole_norm(self, stream: int) -> Tensor | None:
        # The only collective waited for in an update without a fault, and only while sharded gradients are clipped.
        if not self._ranks.sharded or self._clipper.value is None:
            return None
        values = gradients(self._parameters(stream))
        return torch.tensor(
            math.hypot(*self._ranks.gather(float(total_norm(partial_norms(values))) if values else 0.0))
        )

    def _note_rate(self) -> None:
        rate = self.rate.first()
        if rate is not None and (not self._rates or self._rates[-1][1] != rate):
            self._rates.append((self._step, rate))

    def _parameters(self, stream: int) -> list[Tensor]:
        return [p for group in self.learner.optimizers[stream].param_groups for p in group["params"]]

    def _loss_scale(self) -> Tensor | None:
        # The tensor itself: get_scale() reads from the device.
        return None if self.learner.scaler is None else getattr(self.learner.scaler, "_scale", None)

    def _confirm(self, stream: int) -> float | None:
        values = gradients(self._parameters(stream))
        return None if suspects(values) else exact_norm(values)

    def _defer(self, pending: PendingReading) -> None:
        optimizer = self.learner.optimizers[pending.stream]
        if self.learner.scaler is None and unscales_itself(optimizer) and not self._settings.observe:
            # Fused optimizers leave their state alone where this flag is set: decided without the host.
            bad = pending.is_bad(by_loss=not self._many)
            optimizer.found_inf, optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
            self._scopes[0].undo_where(bad)  # now: the next batch builds on the buffers of this one
            pending.held_back = True
        pending.send()
        self._queue.append((pending, self._scopes[0]))

    def _drop_flags(self) -> None:
        for optimizer in self.learner.optimizers:
            for name in ("found_inf", "grad_scale"):
                vars(optimizer).pop(name, None)

    def _read_arrived(self, stream: int) -> None:
        while self._queue and not self._found:
            pending, scope = self._queue[0]
            if pending.step > self._step - _MAX_DELAY and not pending.arrived():
                return
            self._queue.popleft()
            self._detect_late(pending, scope, stream)

    # ---------------------------------------------------------------------------------------- detect

    def _detect_late(self, pending: PendingReading, scope: BatchScope, stepping: int | None) -> None:
        reading = pending.read()
        # The device holds back what is not finite; a finite spike went through.
        self._detect(reading, scope, stepping, reached=not (pending.held_back and not reading.finite), late=True)

    # ---------------------------------------------------------------------------------------- several ranks

    # Whether and when a rank waits must not hang on what it alone knows: every rank tells of every update (`_tell`) and
    # hears of it at the same point of a later one (`_hear`). A rank may hear early of an update that looks bad to it,
    # since all have told or are about to; only if it looks bad to all, all of them have heard, and act together.

    def _tell(self, pending: PendingReading | None, stream: int) -> None:
        trial = self._closures(stream) > 1
        if self._settings.deferred and pending is not None:
            self._defer(pending)
            self._post_queued(1)
            return
        reading = Reading(self._step, stream, None, None) if pending is None else self._read(pending, stream)
        report = self._report_on(reading, suspects=self._suspects(reading))
        sent = _Sent(self._ranks.post(report), stream, self._scopes[0], held_back=False, trial=trial)
        if report.suspects and all(one.suspects for one in sent.posted.reports()):
            self._judge(sent, stream, late=False)
            return
        if report.suspects and not report.gradient_finite and not self._settings.observe:
            self._blocker.block(stream)  # others do not: they hear of it in the next update, and all go back
        self._sent.append(sent)

    def _post_queued(self, left: int) -> None:
        while len(self._queue) > left:
            pending, scope = self._queue.popleft()
            report = self._report_on(pending.read(), suspects=False)
            self._sent.append(_Sent(self._ranks.post(report), pending.stream, scope, pending.held_back, trial=False))

    def _hear(self, stepping: int | None) -> None:
        while self._sent and not self._found:
            sent = self._sent.popleft()
            self._judge(sent, stepping, late=True)

    def _suspects(self, reading: Reading) -> bool:
        # By the gradient alone, which is the same on all ranks: losses are not.
        if self.learner.scaler is not None and not self._gradient_finite(reading):
            return True  # whether it is an overflow, or comes from a loss, shows in the losses of all
        gradient = replace(reading, loss=None, loss_finite=True, finite=self._gradient_finite(reading))
        return any(detector.check(gradient) is not None for detector in self._of(reading.stream)[0])

    @staticmethod
    def _gradient_finite(reading: Reading) -> bool:
        return reading.grad_norm is None or math.isfinite(reading.grad_norm)

    def _report_on(self, reading: Reading, *, suspects: bool) -> Report:
        interval, judged, objects, parameters, moments = self._keeper.tell()
        return Report(
            loss=reading.loss or 0.0,
            norm=reading.grad_norm or 0.0,
            scale=reading.loss_scale or 0.0,
            step=reading.step,
            has_loss=reading.loss is not None,
            has_gradient=reading.grad_norm is not None,
            gradient_finite=self._gradient_finite(reading),
            has_scale=reading.loss_scale is not None,
            suspects=suspects,
            interval=interval,
            judged=judged,
            objects=objects,
            parameters=parameters,
            moments=moments,
            outside=self._outside is not None,
        )

    def _judge(self, sent: _Sent, stepping: int | None, *, late: bool) -> None:
        reports = sent.posted.reports()
        self._keeper.hear(reports)
        reading = combined(reports, stream=sent.stream, sharded=self._ranks.sharded)
        nobody = all(not one.gradient_finite for one in reports) and sent.held_back
        self._detect(
            reading, sent.scope, stepping, reached=late and not nobody, late=late, trial=sent.trial,
            ranks=conspicuous(reports),
        )  # fmt: skip
        if any(one.outside for one in reports):
            self._hear_of_outside(reading)

    def _hear_of_outside(self, reading: Reading) -> None:
        mine, self._outside = self._outside, None
        told = self._ranks.gather(None if mine is None else [mine.kind, mine.scope, mine.place, mine.message])
        ranks = tuple(rank for rank, one in enumerate(told) if one is not None)
        if ranks:
            kind, scope, place, message = told[ranks[0]]
            some = ranks if len(ranks) < len(told) else ()
            self._found.append(_Found(Fault(kind, scope, place, None, message), reading, None, False, True, some))

    def _read(self, pending: PendingReading, stream: int) -> Reading:
        return pending.read(lambda: self._confirm(stream))

    def _detect(
        self,
        reading: Reading,
        scope: BatchScope,
        stepping: int | None,
        *,
        reached: bool,
        late: bool,
        trial: bool | None = None,
        ranks: tuple[int, ...] = (),
    ) -> None:
        if self.learner.scaler is not None and reading.loss_finite and not reading.finite:
            reading = replace(reading, scaler_skips=True)
        self.non_finite += not reading.finite and not reading.scaler_skips
        detectors, _ = self._of(reading.stream)
        # Further closures of one step (LBFGS) look at bad places on purpose, and are no history.
        if trial is None:
            trial = stepping is not None and self._closures(stepping) > 1
        if trial:
            detectors = [detector for detector in detectors if isinstance(detector, NonFinite)]
        fault = next((fault for detector in detectors if (fault := detector.check(reading)) is not None), None)
        if fault is None:
            if not trial:
                self._accept(reading)
            return
        if fault.doubtful and (late or self._many or not self._host.batch_strange()):
            if not trial:
                self._accept(reading)
            return
        if fault.place == "gradient" and not reading.finite and not late:
            place, _ = first(self._ranks, self._bad_gradient(reading.stream))
            fault = replace(fault, place=place or fault.place)
        found = _Found(fault, reading, scope, reached and fault.scope == "batch", late, ranks)
        # A suspicion is no reason to block: its update is finite, and a restore would rewind it with the rest.
        suspicion = fault.scope == "learner" and not reading.scaler_skips
        if self._settings.observe and not suspicion and not late:
            self._bad_in_a_row += 1
            self._handle(found)  # now, while the update that an acting guard would block has not been made
            return
        self._found.append(found)
        if stepping is not None and not suspicion and not self._settings.observe and (not late or reached):
            self._blocker.block(stepping)

    def _of(self, stream: int) -> tuple[list[Detector], Trend]:
        if stream not in self._detectors:
            self._detectors[stream] = [copy.deepcopy(detector) for detector in self._prototypes]
            self._trends[stream] = Trend()
        return self._detectors[stream], self._trends[stream]

    def _closures(self, stream: int) -> int:
        return self._measured[stream] if isinstance(self.learner.optimizers[stream], LBFGS) else 1

    def _accept(self, reading: Reading) -> None:
        for detector in self._detectors[reading.stream]:
            detector.accept(reading)
        self._trends[reading.stream].accept(reading)
        self._readings.append(reading)

    def _bad_gradient(self, stream: int) -> str | None:
        names = self.learner.parameter_names()
        parameters = [parameter for parameter in self._parameters(stream) if parameter.grad is not None]
        bad = suspects(gradients(parameters))
        return f"gradient of {names.get(id(parameters[bad[0]]), 'a parameter')}" if bad else None

    # ---------------------------------------------------------------------------------------- decide

    def _handle(self, found: _Found) -> None:
        fault, reading = found.fault, found.reading
        before: Mapping[str, Tensor] = {}
        # What the batch did to batch norm's statistics is undone with it, and is no state gone bad.
        if fault.scope == "batch" and not found.reached and found.scope is not None:
            if self._settings.observe:
                before = found.scope.before()
            else:
                self._undo(found)
        known = Evidence(
            step=self._step,
            healthy_steps=self._healthy_steps,
            healthy_since_restore=self._healthy_since_restore,
            bad_in_a_row=max(1, self._bad_in_a_row),
            undo=found.reached,
        )
        trend = self._trends.get(reading.stream) or Trend()
        at_hand = not found.late
        evidence = self._investigator.look_into(
            fault, reading, trend, known, at_hand=at_hand, before=before, rates=self._rates
        )
        if fault.kind == "non_finite_validation" and evidence.corrupt is None:
            self._restored = None
            # The validation data, most likely.
            self._record(fault, fault.place, (), self.rate.effective(), ranks=found.ranks)
            return
        plan, state = self._policy.decide(fault, evidence, self._policy_state)
        if plan:
            self._policy_state = state
            self._act(found, evidence, plan)
            lasts = self._bad_in_a_row >= self._policy.patience and not evidence.batch_strange
            if fault.kind == "gradient_spike" and lasts:
                self._trends[reading.stream].accept(reading)
                for detector in self._detectors[reading.stream]:
                    detector.accept(reading)  # a rise that lasts is no spike
            return
        for detector in self._detectors.get(reading.stream, ()):
            detector.dismiss(reading)
        if reading.stream in self._detectors and reading.loss is not None:
            self._accept(reading)

    # ---------------------------------------------------------------------------------------- act

    def _act(self, found: _Found, evidence: Evidence, plan: Plan) -> None:
        before = self.rate.effective()
        stop = next((step for step in plan if isinstance(step, Stop)), None)
        self._acting_on, self._restored = found, None
        # Now, while weights and batch are still those of the fault.
        mine = self._host.diagnose(found.fault, evidence, self._look(found), found.reading.step)
        finding = surest(self._ranks, mine)
        if not self._settings.observe:
            if not any(isinstance(step, Skip) for step in plan):
                self.skip()  # a restore, too, leaves nothing of the batch behind
            if stop is not None:
                self._leave_good()
            for step in plan:
                self._executors[type(step)].apply(step, self)
        words = tuple(self._executors[type(step)].word for step in plan)
        place = evidence.corrupt if evidence.corrupt is not None else found.fault.place
        ranks = evidence.ranks or found.ranks
        clock = self._clock(found)
        self._record(found.fault, place, words, before, finding, ranks, clock)
        if stop is not None and not self._settings.observe:
            self._stop(found.fault, place, stop.reason, finding, clock)
        self._tried.append(f"{found.fault.kind}: {', '.join(words)}")

    def _leave_good(self) -> None:
        if self.ring.certified:
            self.restore(0)
        elif self.ring.pending is not None and first(self._ranks, self._investigator.corrupt(self.learner.leaves()))[0]:
            # Nothing was ever proven good, but what the fit began with is at least finite.
            restore(self.learner, self.ring.pending)

    def _look(self, found: _Found) -> Look:
        if found.scope is None:
            return "nothing"  # it was found outside a batch
        return "batch" if self._settings.observe else "replay"

    def _clock(self, found: _Found) -> tuple[int, int, int]:
        # What is read late is on record under the batch it was found in.
        past = (clock for step, clock in self._clocks if step >= found.reading.step)
        return next(past, self._host.clock()) if found.late else self._host.clock()

    def _stop(
        self, fault: Fault, place: str, reason: str, finding: Finding | None, clock: tuple[int, int, int]
    ) -> None:
        global_step, epoch, batch_idx = clock
        to = None if self._restored is None else self._restored.global_step
        good = "There is no good state to go back to." if to is None else f"The module holds the weights of step {to}."
        raise TrainingDivergedError(
            f"Training cannot go on: {reason}. Step {global_step} (epoch {epoch}, batch {batch_idx}): {fault.message} "
            f"({fault.kind}, {place}). {_why(finding)}Tried before: {'; '.join(self._tried) or 'nothing'}. "
            f"{good} {self.on_disk()}{_ADVICE}",
            fault=fault,
            reason=reason,
            tried=tuple(self._tried),
            snapshot_step=to,
            finding=finding,
        )

    def _record(
        self,
        fault: Fault,
        place: str,
        words: tuple[str, ...],
        before: list[float],
        finding: Finding | None = None,
        ranks: tuple[int, ...] = (),
        clock: tuple[int, int, int] | None = None,
    ) -> None:
        global_step, epoch, batch_idx = self._host.clock() if clock is None else clock
        after = self.rate.effective()
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
                snapshot_step=None if self._restored is None else self._restored.global_step,
                cause=None if finding is None else finding.cause,
                finding=finding,
                message=fault.message,
                value=fault.value,
                applied=not self._settings.observe,
                ranks=ranks,
                updates_lost=0 if self._restored is None else self._step - self._restored.step,
            )
        )

    # What remedies may do: see lightning_nanguard.remedies.Patient.

    def skip(self) -> None:
        """Undo what the batch touched."""
        if self._acting_on is not None:
            self._undo(self._acting_on)

    def _undo(self, found: _Found) -> None:
        if found.scope is not None:
            # What the device held back it has undone already, and later batches have built on it.
            found.scope.undo(buffers=not found.late or found.reached)
            self._blocker.undo()

    def restore(self, depth: int) -> None:
        """Go back to a certified snapshot."""
        self.ring.drop_pending()
        snapshot = self._restored = self._ranks.whole(self.ring.discard_newer(depth))
        restore(self.learner, snapshot)
        self._healthy_since_restore = 0
        self._keeper.count_from(self._step)
        self._queue.clear()
        self._sent.clear()
        for stream, detectors in self._detectors.items():
            self._trends[stream].rewind(snapshot.step)
            for detector in detectors:
                detector.rewind(snapshot.step)
        self._clear_gradients()

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        """Multiply the learning rate, or with ``limit`` allow no larger one than results."""
        rate = self.rate
        if limit or rate.ratio() < rate.multiplier:
            rate.set_multiplier(rate.multiplier, min_lr=min_lr, max_lr=rate.effective()[0] * factor)
        else:
            rate.set_multiplier(min(1.0, rate.multiplier * factor), min_lr=min_lr, max_lr=rate.max_lr)
        self._reviews.begin(self._healthy_steps)

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip from now on; ``inf`` ends it."""
        self._clipper.set(value, algorithm)
        self._clipping_since = self._healthy_steps

    def clip_now(self, optimizer: Optimizer) -> None:
        """Clip gradients that are no longer scaled, if clipping is on."""
        self._clipper.clip(optimizer)

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""
        for optimizer in self.learner.optimizers:
            optimizer.state.clear()

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Try a rate out from the state just gone back to."""
        if self._restored is None:
            return None
        self._blocker.blocked.clear()  # the faulty update is over, and rehearsed ones must be made
        return self._rehearsal.loss_after(self._restored, factor, updates)

    def _own_scale(self) -> float:
        return max((trend.scale() for trend in self._trends.values()), default=0.0)

    def _clear_gradients(self) -> None:
        for optimizer in self.learner.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------------------------------- healthy

    def _healthy(self) -> None:
        self._bad_in_a_row = 0
        if all(reading.scaler_skips for reading in self._readings):
            return  # the scaler skipped it: nothing was learned about the state
        self._healthy_steps += 1
        if self._healthy_since_restore is not None:
            self._healthy_since_restore += 1
        self._certify()
        if self._keeper.due(self._step):
            self._capture()
        if not self._settings.observe:
            self._give_back()

    def _capture(self) -> Snapshot:
        global_step, _, _ = self._host.clock()
        return self._keeper.capture(self._step, global_step, self.rate.first(), self._healthy_steps)

    def _certify(self) -> None:
        if not self.ring.healthy(min(reading.step for reading in self._readings)) or self.ring.pending is None:
            return
        pending = self.ring.pending
        uneasy = any(detector.uneasy(r) for r in self._readings for detector in self._detectors[r.stream])
        if uneasy and pending.healthy < _CERTIFY_ANYWAY:
            return
        if not self._keeper.judged(pending):
            return
        fault, ranks = self._keeper.objection(pending, self._healthy_steps)
        if fault is not None:
            self.ring.drop_pending()
            self._handle(_Found(fault, self._readings[-1], None, reached=False, ranks=ranks))
            return
        trend = self._trends[self._readings[0].stream]
        pending.level = trend.level()
        early = self._healthy_steps < _EARLY
        self.ring.certify(0.1 * trend.scale(), self._keeper.kept(pending), keep_oldest=early)
        if trend.learning():
            self._policy_state = self._policy.prove(pending.rate, self._policy_state)

    def _give_back(self) -> None:
        reduce, clip = self._executors[ReduceLR.step], self._executors[ClipGradients.step]
        self._restored = None
        before = self.rate.effective() if self.rate.is_on() else []
        ratio = self.rate.ratio() if before else 1.0
        if ratio < 1.0 and isinstance(reduce, ReduceLR):
            plan, self._policy_state = self._policy.give_back(
                Evidence(self._step, healthy_steps=self._healthy_steps, multiplier=ratio),
                self._policy_state,
                scheduled_lr=self.rate.scheduled()[0],
                factor=reduce.factor,
                after=reduce.recover_after,
                learning=all(trend.learning() for trend in self._trends.values()),
            )
            for step in plan:
                if isinstance(step, Scale) and reduce.rehearse and self._rehearsal.harmful(step.factor):
                    self._policy_state = replace(self._policy_state, proven_rate=0.0)
                elif isinstance(step, Scale):
                    self._raise_rate(ratio * step.factor, step, reduce.min_lr)
                    self._record(_HEALTHY, "", ("give back",), before)
                    self._reviews.begin(self._healthy_steps)
            self._review(reduce)
        self._end_clipping(clip)

    def _review(self, reduce: ReduceLR) -> None:
        # The cut was chosen on next to no evidence; now there is more.
        if not (reduce.rehearse and self._reviews.due(self._healthy_steps)):
            return
        before, ratio = self.rate.effective(), self.rate.ratio()
        factor = self._rehearsal.review(may_rise=ratio <= 0.5 and 4 * before[0] < self._policy_state.bad_rate)
        if factor > 1:
            self._raise_rate(ratio * factor, Scale(factor), reduce.min_lr)
        elif factor < 1:
            self.scale(factor, reduce.min_lr)
            failed = min(self._policy_state.bad_rate, before[0])
            self._policy_state = replace(self._policy_state, bad_rate=failed)
        if factor != 1:
            self._reviews.begin(self._healthy_steps)
            self._policy_state = replace(self._policy_state, given_back_at=self._healthy_steps)
            self._record(_HEALTHY if factor > 1 else _STALLED, "", ("give back" if factor > 1 else "scale",), before)

    def _raise_rate(self, ratio: float, step: Scale, min_lr: float) -> None:
        multiplier, limit = self.rate.multiplier, self.rate.max_lr
        if step.limit:
            multiplier, limit = 1.0, self.rate.effective()[0] * step.factor
        else:
            multiplier, limit = min(1.0, multiplier * step.factor), limit * step.factor
        self.rate.set_multiplier(multiplier, min_lr=min_lr, max_lr=math.inf if ratio >= 1.0 else limit)

    def _end_clipping(self, clip: Remedy) -> None:
        healthy = self._healthy_steps - self._clipping_since
        if self._clipper.value is not None and isinstance(clip, ClipGradients) and healthy >= clip.recover_after:
            self.clip(math.inf, "norm")
            self._record(_HEALTHY, "", ("end clipping",), self.rate.effective())

    # ---------------------------------------------------------------------------------------- state

    @property
    def clip_val(self) -> float | None:
        """The clipping value in force, ``None`` without one."""
        return self._clipper.value

    @property
    def in_window(self) -> bool:
        """Whether an update is being accumulated."""
        return self._open

    @property
    def updates(self) -> int:
        """Attempted updates so far."""
        return self._step

    def trend(self, stream: int = 0) -> Trend | None:
        """History of one optimizer's losses and norms, ``None`` before its first reading."""
        return self._trends.get(stream)

    def usual_norm(self) -> float | None:
        """Median of the healthy gradient norms of the first optimizer."""
        trend = self._trends.get(0)
        return trend.usual_norm() if trend is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped, in plain containers."""
        return {
            "step": self._step,
            "non_finite": self.non_finite,
            "healthy_steps": self._healthy_steps,
            "healthy_since_restore": self._healthy_since_restore,
            "bad_in_a_row": self._bad_in_a_row,
            "clipping_since": self._clipping_since,
            "clipper": self._clipper.state_dict(),
            "rate": self.rate.state_dict(),
            "reviews": self._reviews.state_dict(),
            "initial_norms": dict(self._investigator.initial_norms),
            "policy": self._policy_state.to_dict(),
            "streams": {
                str(stream): {
                    "trend": self._trends[stream].state_dict(),
                    "detectors": [[type(detector).__qualname__, detector.state_dict()] for detector in detectors],
                }
                for stream, detectors in self._detectors.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it before :meth:`start`."""
        self._step = int(state["step"])
        self._keeper.count_from(self._step)
        self.non_finite = int(state["non_finite"])
        self._healthy_steps = int(state["healthy_steps"])
        self._healthy_since_restore = state["healthy_since_restore"]
        self._bad_in_a_row = int(state["bad_in_a_row"])
        self._clipping_since = int(state["clipping_since"])
        self._clipper.load_state_dict(state["clipper"])
        self.rate.load_state_dict(state["rate"])
        self._reviews.load_state_dict(state["reviews"])
        self._investigator.initial_norms = dict(state["initial_norms"])
        self._policy_state = PolicyState.from_dict(state["policy"])
        for stream, saved in state["streams"].items():
            trend = self._trends[int(stream)] = Trend()
            trend.load_state_dict(saved["trend"])
            detectors = self._detectors[int(stream)] = [copy.deepcopy(detector) for detector in self._prototypes]
            _take_histories_up(detectors, saved["detectors"])


def _take_histories_up(detectors: Sequence[Detector], saved: Sequence[Sequence[Any]]) -> None:
    """The n-th detector of a class takes up the history of the n-th of that class: the list around may have changed."""
    histories: dict[str, deque[Any]] = {}
    for name, history in saved:
        histories.setdefault(name, deque()).append(history)
    for detector in detectors:
        own = histories.get(type(detector).__qualname__)
        if own:
            detector.load_state_dict(own.popleft())


def _why(finding: Finding | None) -> str:
    if finding is None:
        return ""
    place = f" in {finding.place}" if finding.place else ""
    return f"Most likely cause: {finding.cause}{place}: {finding.suggestion} "
