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

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.clip_gradients import ClipGradients
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.reduce_lr import ReduceLR
from lightning_nanguard.act.skip import StepSkipper, unscales_itself
from lightning_nanguard.checkpoints.saving import SaveGuard
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.decide.rate_limit import within_curvature
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.detect.monitors import Monitors
from lightning_nanguard.diagnosis.clues import Look
from lightning_nanguard.distributed.ranks import Alone, Ranks, first, surest
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.guard.deferred import MAX_DELAY, DeferredReadings
from lightning_nanguard.guard.investigator import Investigator, Witness, norms_to_grow_from
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.rank_readings import RankReadings, Sent, gradient_finite
from lightning_nanguard.guard.recorder import Book, InterventionRecorder
from lightning_nanguard.guard.recovery import Recovery
from lightning_nanguard.guard.rehearsal import Rehearsal, Stage
from lightning_nanguard.guard.remedy_actions import RemedyActions
from lightning_nanguard.guard.snapshot_manager import SnapshotManager
from lightning_nanguard.guard.state import GuardState
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.finite import corrupt
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import mend_averages, restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Evidence, Fault, Finding, Plan, Reading, Scale, Skip, Stop

_logger = logging.getLogger("lightning_nanguard")


class Rerun(Witness, Stage, Protocol):
    """Batches seen again, and run again, without a trace."""

    def showing(self, update: int) -> AbstractContextManager[bool]:
        """Inside, the batch at hand is that of an update which is over; whether it is still there."""


class Host(Book, Protocol):
    """What the guard asks of the loop around it."""

    @property
    def stage(self) -> Rerun:
        """Where batches are run again."""

    def micro_batches(self) -> int:
        """By how many micro-batches the loss is divided."""

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        """Why the fault of an update happened, ``None`` where that was not found; it changes nothing."""


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
    scope: BatchUndo | None
    reached: bool
    late: bool = False
    ranks: tuple[int, ...] = ()


# A state that no detector objects to, though one is uneasy about it, is certified after this many readings.
_CERTIFY_ANYWAY = 100


# After an update that had to be undone so many are judged before they are made: faults come in company, and each that
# is undone costs what was learned since the snapshot. Each time it happens again twice as many, but doubled no more
# often than this.
_CAREFUL = 1000


_MOST_DOUBLED = 10


# Updates from whose readings detectors know what is usual.
_BEGINNING = 20


# Healthy updates for which the state of the start is kept: ruin by a rate shows by then.
_EARLY = 1000


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
        make_scope: Callable[[], BatchUndo],
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
        self._standing = GuardState()
        self._monitors = Monitors(detectors)
        self._meter = Meter(learner, host.micro_batches, many_losses=not host.stage.comparable())
        self._rehearsal = Rehearsal(learner, rate, host.stage, self._monitors.loss_unit, self._ranks)
        self._investigator = Investigator(
            learner, ring, rate, host.stage, self._rehearsal, compare=not settings.observe, ranks=self._ranks
        )
        self._blocker = StepSkipper(learner)
        self._keeper = SnapshotManager(
            learner,
            ring,
            self._investigator,
            every=settings.snapshot_every,
            device=settings.snapshot_device,
            choose=settings.choose_place,
            ranks=self._ranks,
        )
        self._executors = executors(remedies)
        self.account = InterventionRecorder(host, rate, self._standing, observe=settings.observe, memory=MAX_DELAY + 2)
        self._recovery = Recovery(
            rate,
            self._executors[ReduceLR.step],
            self._executors[ClipGradients.step],
            self._standing,
            policy,
            self._monitors,
            self._rehearsal,
            self.account,
            may_lower=any(remedy.step is ReduceLR.step for remedy in remedies),
        )
        self._hands = RemedyActions(
            learner,
            ring,
            self._standing,
            self._recovery,
            self._rehearsal,
            host.stage,
            self._blocker,
            ranks=self._ranks,
        )
        self._saving = SaveGuard(
            learner, ring, self._investigator, self.note, observe=settings.observe, ranks=self._ranks
        )
        self._arrivals = DeferredReadings(learner, by_loss=not self._many, observe=settings.observe)
        self._exchange = RankReadings(self._ranks, learner, self._keeper, self._monitors)
        # In deferred readback, and among ranks, a batch is judged up to two updates later, and must still be undone.
        self._scopes = deque(make_scope() for _ in range(MAX_DELAY + 2 if settings.deferred or self._many else 1))
        self.non_finite = 0
        # Whether weights and averages have changed places, as WeightAveraging has them do in validation.
        self.swapped = False
        # Step and effective rate, for each step after which the rate of the first group was another.
        self._rates: deque[tuple[int, float]] = deque(maxlen=1024)
        # What belongs to the batch at hand.
        self._open = False
        self._updated = False
        self._readings: list[Reading] = []
        self._found: list[_Found] = []
        self._undone = 0
        self._careful_until = 0
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
        self.rate.attach(self._blocker.remove_gradients)
        self._keep_start()

    def _keep_start(self) -> None:
        self._lazy = self.learner.lazy()
        if not self._investigator.initial_norms:
            self._investigator.initial_norms = norms_to_grow_from(self.learner.weights())
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
        self._meter.see_loss(loss)

    def before_step(self, optimizer_index: int) -> None:
        """Measure and detect; block the update where it is bad.

        Args:
            optimizer_index: Index of the optimizer about to step.
        """
        self._keeper.settle()
        late = self._reads_late(optimizer_index)
        if self._many:
            self._hear(optimizer_index)
        elif self._settings.deferred:
            self._read_arrived(optimizer_index, wait=not late)  # first: what is read late must find its batch's scope
        if self._lazy and not self.learner.lazy():
            self._keep_start()
            self._keeper.settle()
        self._standing.step += 1
        measure = self._meter.measure_later if late else self._meter.measure_now
        measured = measure(self._standing.step, optimizer_index)
        self._meter.losses = []
        self._updated = True
        self._note_rate()
        if measured is None and not self._many:
            return
        norm: float | None = None
        if self._found and any(one.reached for one in self._found) and not self._settings.observe:
            # The weights are bad already: nothing that comes of them is measured, or reaches them.
            self._blocker.skip(optimizer_index)
            return
        if measured is None or self._many:
            self._tell(measured, optimizer_index)
        elif isinstance(measured, PendingReading):
            self._arrivals.defer(measured, self._scopes[0])
            self._read_arrived(optimizer_index)
        else:
            norm = measured.grad_norm
            self._detect(measured, self._scopes[0], optimizer_index, reached=False, late=False)
            if self._keeper.watches_statistics and not self._found:
                self._look_at_statistics(measured)
        if self._recovery.clipper.value is not None:
            self._clip(optimizer_index, norm)

    def _look_at_statistics(self, reading: Reading) -> None:
        scope = self._scopes[0]
        fault = self._keeper.strange_statistics(scope.before(), self._standing.healthy_steps)
        # What batch after batch brings is how the data are from now on.
        if fault is not None and self._standing.bad_in_a_row < self._policy.patience:
            self._blocker.skip(reading.optimizer_index)
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
                self._open, self._meter.losses = False, []  # a batch without an update, and none to come of it
            return True
        if self._settings.deferred or self._many:
            self._arrivals.drop_flags()
            self.account.mark()
        found = self._take_found()
        self._standing.restored = None
        try:
            for one in found:
                self._handle(one)
                if self._standing.restored is not None:
                    break  # what else was found belonged to the state just left
            if self._readings and not found:
                self._healthy()
        finally:
            self._open = self._updated = False
            self._readings = []
            self._meter.end_batch()
            self._blocker.skipped.clear()
        return not found

    def report(self, fault: Fault) -> None:
        """Take a fault that was found outside a step, such as in validation.

        It is acted on at once; among several ranks, of which this may be the only one that saw it, when all have heard
        of it with the next update.
        """
        if self._many:
            self._exchange.outside = fault
        else:
            self._report(fault, ())

    def _report(self, fault: Fault, ranks: tuple[int, ...]) -> None:
        self._handle(_Found(fault, Reading(self._standing.step, 0, None, None), None, reached=False, ranks=ranks))

    def before_save(self) -> None:
        """Look at the state before it is written.

        Within a batch, whose graph needs its tensors as they are, and while averages take the weights' place, nothing
        is changed: :meth:`mend` alone sees to it that what is written is good.
        """
        self._saving.begin()
        if not self._open and not self.swapped:
            self.check()
        else:
            self._saving.prepare()

    def after_save(self) -> None:
        """It has been written."""
        self._saving.end()

    def want_snapshot(self) -> None:
        """Take a snapshot at the end of this batch, or of the next one that is healthy."""
        self._keeper.want()

    def note(self, fault: Fault, *words: str) -> None:
        """Record what was done outside the order of a step."""
        self._standing.restored = None
        self.account.record(fault, fault.place, words, self.rate.effective())

    def check(self) -> None:
        """Look at the state of now, and go back to the last good one if it is bad."""
        self._keeper.settle()  # whoever asks may write to it next
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
        return self._saving.mend(checkpoint, path, recorded=checked and not self._open and not self.swapped)

    def flush(self) -> None:
        """Read what is still on its way, and act on it."""
        if self._many:
            self._post_queued(0)
            self._hear(None)
        while self._arrivals or self._found:
            while self._arrivals and not self._found:
                self._detect_late(*self._arrivals.next(), None)
            for one in self._take_found():
                self._handle(one)

    def _take_found(self) -> list[_Found]:
        if not self._found:
            return []
        found, self._found = self._found, []
        self._standing.bad_in_a_row += any(one.fault.scope == "batch" for one in found)
        return found

    def finish(self) -> None:
        """The last update has been made: look at the state that is left, and read what is still on its way.

        Among several ranks only the latter: where their data are uneven, others never come here.
        """
        if self._many:
            self.flush()
            return
        self.check()
        # No snapshot may have fallen due since a weight or an average went out of range.
        fault = self._keeper.implausible(dict(self.learner.leaves()), self._standing.healthy_steps)
        if fault is not None:
            self._report(fault, ())

    def close(self) -> None:
        """Let go of the optimizers."""
        self._arrivals.drop_flags()
        self.rate.detach()
        # The guard and its host know each other: their memory would stay until the collector comes by.
        self.ring.clear()
        self._standing.restored = None
        self._ranks.close()

    def part(self) -> None:
        """This process has raised: among several it is alone from now on, and waits for none of the others."""
        if self._many:
            self._exchange.clear()
            self._arrivals.clear()
            self._ranks.part()

    # ---------------------------------------------------------------------------------------- measure and detect

    def _clip(self, optimizer_index: int, norm: float | None) -> None:
        optimizer = self.learner.optimizers[optimizer_index]
        scale = self._meter.loss_scale() if unscales_itself(optimizer) else None
        if self._ranks.sharded:
            # The only collective waited for in an update without a fault, and only while sharded gradients are clipped.
            norm = math.hypot(*self._ranks.gather(self._meter.gradient_norm(optimizer_index)))
        elif scale is not None:
            norm = None  # what was read is that of unscaled gradients
        if optimizer_index not in self._blocker.skipped and not self._settings.observe:
            known = None if norm is None else torch.tensor(norm)
            self._recovery.clipper.clip(self.learner.gradients(optimizer_index), scale, known)

    def _note_rate(self) -> None:
        rate = self.rate.first()
        if rate is not None and (not self._rates or self._rates[-1][1] != rate):
            self._rates.append((self._standing.step, rate))

    def _reads_late(self, optimizer_index: int) -> bool:
        if not self._settings.deferred or self._standing.step < self._careful_until:
            return False
        return self._settings.observe or not self._blocker.device_cannot_skip(optimizer_index)

    def _read_arrived(self, optimizer_index: int, *, wait: bool = False) -> None:
        due = self._standing.step + MAX_DELAY if wait else self._standing.step
        while not self._found and (late := self._arrivals.arrived(due)) is not None:
            self._detect_late(*late, optimizer_index)

    def _detect_late(self, pending: PendingReading, scope: BatchUndo, stepping: int | None) -> None:
        reading = pending.read()
        # The device holds back what is not finite; a finite spike went through.
        self._detect(reading, scope, stepping, reached=not (pending.held_back and not reading.finite), late=True)

    # Among several ranks; see lightning_nanguard.exchange.

    def _tell(self, measured: PendingReading | Reading | None, optimizer_index: int) -> None:
        trial = self._meter.is_line_search(optimizer_index)
        if isinstance(measured, PendingReading):
            self._arrivals.defer(measured, self._scopes[0])
            self._post_queued(1)
            return
        self._post_queued(0)
        reading = Reading(self._standing.step, optimizer_index, None, None) if measured is None else measured
        suspects = self._exchange.suspects(reading)
        sent = self._exchange.tell(reading, self._scopes[0], suspects=suspects, trial=trial)
        if suspects and sent.suspected_by_all():
            self._judge(sent, optimizer_index, late=False)
            return
        if suspects and not gradient_finite(reading) and not self._settings.observe:
            self._blocker.skip(optimizer_index)  # others do not: they hear of it in the next update, and all go back
        self._exchange.keep(sent)

    def _post_queued(self, left: int) -> None:
        while len(self._arrivals) > left:
            pending, scope = self._arrivals.next()
            sent = self._exchange.tell(pending.read(), scope, held_back=pending.held_back, trial=False)
            self._exchange.keep(sent)

    def _hear(self, stepping: int | None) -> None:
        while not self._found and (sent := self._exchange.next()) is not None:
            self._judge(sent, stepping, late=True)

    def _judge(self, sent: Sent, stepping: int | None, *, late: bool) -> None:
        heard = self._exchange.hear(sent)
        self._detect(
            heard.reading, sent.scope, stepping, reached=late and not heard.held_back, late=late, trial=sent.trial,
            ranks=heard.ranks,
        )  # fmt: skip
        outside = self._exchange.ask_outside() if heard.outside else None
        if outside is not None:
            fault, ranks = outside
            self._found.append(_Found(fault, heard.reading, None, False, True, ranks))

    def _detect(
        self,
        reading: Reading,
        scope: BatchUndo,
        stepping: int | None,
        *,
        reached: bool,
        late: bool,
        trial: bool | None = None,
        ranks: Callable[[], tuple[int, ...]] = tuple,
    ) -> None:
        # Further closures of one step (LBFGS) look at bad places on purpose, and are no history.
        if trial is None:
            trial = stepping is not None and self._meter.is_line_search(stepping)
        if not trial and self._monitors.passes(reading):
            self._readings.append(reading)  # nearly always
            return
        if self.learner.scaler is not None and reading.loss_finite and not reading.finite:
            reading = reading._replace(scaler_skips=True)
        self.non_finite += not reading.finite and not reading.scaler_skips
        fault = self._monitors.check(reading, trial=trial, wanders=reading.optimizer_index in self.learner.quasi_newton)
        if fault is not None and fault.doubtful:
            fault = fault if self._batch_is_strange(_Found(fault, reading, scope, reached, late)) else None
        if fault is None:
            if not trial:
                self._accept(reading)
            return
        if fault.place == "gradient" and not reading.finite and not late:
            place, _ = first(self._ranks, self._meter.first_bad_gradient(reading.optimizer_index))
            fault = replace(fault, place=place or fault.place)
        found = _Found(fault, reading, scope, reached and fault.scope == "batch", late, ranks())
        # A suspicion is no reason to block: its update is finite, and a restore would rewind it with the rest.
        suspicion = fault.scope == "learner" and not reading.scaler_skips
        if self._settings.observe and not suspicion and not late:
            self._standing.bad_in_a_row += 1
            self._handle(found)  # now, while the update that an acting guard would block has not been made
            return
        self._found.append(found)
        if stepping is not None and not suspicion and not self._settings.observe and (not late or reached):
            self._blocker.skip(stepping)

    def _batch_is_strange(self, found: _Found) -> bool:
        if self._many:
            return False  # ranks would look at different times
        with self._batch_of(found) as at_hand:
            return at_hand and self._host.stage.batch_strange() is True

    def _accept(self, reading: Reading) -> None:
        self._monitors.accept(reading)
        self._readings.append(reading)

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
            step=self._standing.step,
            healthy_steps=self._standing.healthy_steps,
            healthy_since_restore=self._standing.healthy_since_restore,
            bad_in_a_row=max(1, self._standing.bad_in_a_row),
            undo=found.reached,
        )
        history = self._monitors.history(reading.optimizer_index) or ReadingHistory()
        with self._batch_of(found) as at_hand:
            evidence = self._investigator.look_into(
                fault, reading, history, known, at_hand=at_hand, before=before, rates=self._rates
            )
        if fault.kind == "non_finite_validation" and evidence.corrupt is None:
            self._standing.restored = None
            # The validation data, most likely.
            self.account.record(fault, fault.place, (), self.rate.effective(), ranks=found.ranks)
            return
        plan, state = self._policy.decide(fault, evidence, self._standing.policy)
        if plan:
            self._standing.policy = state
            self._investigator.conclude(fault, batch=plan == (Skip(),))
            self._act(found, evidence, plan)
            lasts = self._standing.bad_in_a_row >= self._policy.patience and not evidence.batch_strange
            if fault.kind == "gradient_spike" and lasts:
                self._monitors.accept(reading)  # a rise that lasts is no spike
            stays = fault.scope == "learner" and self._standing.restored is None
            if not (stays and reading.finite and reading.loss_finite):
                return
            # The learner is still where it was: it has been said and dealt with, and is again, ever more rarely.
        if self._monitors.dismiss(reading) and reading.loss is not None:
            self._accept(reading)

    @contextmanager
    def _batch_of(self, found: _Found) -> Iterator[bool]:
        if found.late and found.scope is not None:
            with self._host.stage.showing(found.reading.step) as shown:
                if all(self._ranks.gather(shown)):
                    yield True
                    return
        yield not found.late

    # ---------------------------------------------------------------------------------------- act

    def _act(self, found: _Found, evidence: Evidence, plan: Plan) -> None:
        before = self.rate.effective()
        stop = next((step for step in plan if isinstance(step, Stop)), None)
        # What a learner without blame read in its first updates, before the fault, holds when it makes them again: data
        # that have gone bad for a while must not become what is usual.
        blameless = found.reached and self._standing.policy.learner_step != evidence.step
        known = min(found.reading.step - 1, _BEGINNING) if blameless else 0
        self._hands.begin(partial(self._undo, found), partial(self._forget, known))
        # Now, while weights and batch are still those of the fault.
        mine = self._host.diagnose(found.fault, evidence, self._look(found), found.reading.step)
        finding = surest(self._ranks, mine)
        plan = within_curvature(plan, finding, before[0] if before else None)
        if not self._settings.observe:
            if not any(isinstance(step, Skip) for step in plan):
                self._hands.skip()  # a restore, too, leaves nothing of the batch behind
            if stop is not None:
                self._leave_good()
            for step in plan:
                self._executors[type(step)].apply(step, self._hands)
            self._judge_sooner(found)
        kept = not self._settings.observe and self.rate.effective() == before
        # Where clipping alone would do, a cut that was planned has not been made.
        done = [step for step in plan if not (kept and isinstance(step, Scale) and step.clipped)]
        words = tuple(self._executors[type(step)].word for step in done)
        place = evidence.corrupt if evidence.corrupt is not None else found.fault.place
        ranks = evidence.ranks or found.ranks
        # What is read late is on record under the batch it was found in.
        clock = self.account.clock_of(found.reading.step) if found.late else self._host.clock()
        self.account.record(found.fault, place, words, before, finding, ranks, clock)
        if stop is not None and not self._settings.observe:
            self.account.stop(found.fault, place, stop.reason, finding, clock)
        self.account.tried(found.fault, words)

    def _judge_sooner(self, found: _Found) -> None:
        # After a restore nothing is on its way any more.
        if not self._settings.deferred or self._standing.restored is None:
            return
        level = logging.DEBUG if self._ranks.rank else logging.WARNING
        # What a batch does to statistics shows only before its update; among ranks each would find that by itself.
        if self._keeper.watches_statistics and not self._many:
            self._settings = replace(self._settings, deferred=False)
            _logger.log(
                level,
                "NaNGuard: a batch spoiled running statistics, and one like it can be kept out only before its update. "
                "From now on every update is read before it is made; set readback='step'.",
            )
        elif found.reached and found.reading.step > self._careful_until:
            updates = _CAREFUL << min(self._undone, _MOST_DOUBLED)
            self._undone += 1
            self._careful_until = self._standing.step + updates
            _logger.log(
                level,
                "NaNGuard: an update that was read too late to hold it back had to be undone (%d so far). The next %d "
                "are read before they are made; set readback='step' to have all of them read so.",
                self._undone,
                updates,
            )

    def _leave_good(self) -> None:
        if self.ring.certified:
            self._hands.restore(0)
        elif self.ring.pending is not None and first(self._ranks, self._investigator.corrupt(self.learner.leaves()))[0]:
            # Nothing was ever proven good, but what the fit began with is at least finite.
            restore(self.learner, self.ring.pending)

    def _look(self, found: _Found) -> Look:
        if found.scope is None:
            return "nothing"  # it was found outside a batch
        return "batch" if self._settings.observe else "replay"

    def _undo(self, found: _Found) -> None:
        if found.scope is not None:
            # What the device held back it has undone already, and later batches have built on it.
            found.scope.undo(buffers=not found.late or found.reached)
            self._blocker.undo()

    def _forget(self, known: int, snapshot: Snapshot) -> None:
        # Everything that was read of states after this one, but for the first updates up to ``known``.
        self._keeper.count_from(self._standing.step)
        self._arrivals.clear()
        self._exchange.clear()
        self._monitors.rewind(max(snapshot.step, known))

    def clip_now(self, optimizer: Optimizer) -> None:
        """Clip gradients that are no longer scaled, if clipping is on."""
        self._recovery.clipper.clip(self.learner.gradients(self.learner.optimizers.index(optimizer)))

    # ---------------------------------------------------------------------------------------- healthy

    def _healthy(self) -> None:
        standing = self._standing
        standing.bad_in_a_row = 0
        if self._readings[-1].scaler_skips and all(reading.scaler_skips for reading in self._readings):
            return  # the scaler skipped it: nothing was learned about the state
        standing.healthy_steps += 1
        if standing.healthy_since_restore is not None:
            standing.healthy_since_restore += 1
        if self.ring.pending is not None:
            self._certify(self.ring.pending)
        if self.ring.pending is None and self._keeper.due(standing.step):
            self._capture()
        if not self._settings.observe:
            self._recovery.give_back()

    def _capture(self) -> Snapshot:
        global_step, _, _ = self._host.clock()
        return self._keeper.capture(self._standing.step, global_step, self.rate.first(), self._standing.healthy_steps)

    def _certify(self, pending: Snapshot) -> None:
        if not self.ring.healthy(min(reading.step for reading in self._readings)):
            return
        uneasy = self._monitors.uneasy(self._readings)
        if uneasy and pending.healthy < _CERTIFY_ANYWAY:
            return
        if not self._keeper.judged(pending):
            return
        fault, ranks = self._keeper.objection(pending, self._standing.healthy_steps)
        if fault is not None:
            self.ring.drop_pending()
            self._handle(_Found(fault, self._readings[-1], None, reached=False, ranks=ranks))
            return
        # Among ranks states go on being certified: while one waits, no other is looked at.
        if not self._many and self._monitors.undecided():
            return
        history = self._monitors.history(self._readings[0].optimizer_index)
        assert history is not None  # its reading was accepted
        pending.level = history.level()
        early = self._standing.healthy_steps < _EARLY
        unit = history.loss_unit()
        self.ring.certify(0.1 * unit, self._keeper.kept(pending), keep_oldest=early)
        if history.learning():
            self._standing.policy = self._policy.prove(pending.rate, pending.level, 0.2 * unit, self._standing.policy)

    # ---------------------------------------------------------------------------------------- state

    @property
    def clip_val(self) -> float | None:
        """The clipping value in force, ``None`` without one."""
        return self._recovery.clipper.value

    @property
    def in_window(self) -> bool:
        """Whether an update is being accumulated."""
        return self._open

    @property
    def updates(self) -> int:
        """Attempted updates so far."""
        return self._standing.step

    def history(self, optimizer_index: int = 0) -> ReadingHistory | None:
        """History of one optimizer's losses and norms, ``None`` before its first reading."""
        return self._monitors.history(optimizer_index)

    def usual_norm(self) -> float | None:
        """Lower quartile of the healthy gradient norms of the first optimizer."""
        history = self._monitors.history(0)
        return history.usual_norm() if history is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped, in plain containers."""
        return {
            "step": self._standing.step,
            "non_finite": self.non_finite,
            "healthy_steps": self._standing.healthy_steps,
            "healthy_since_restore": self._standing.healthy_since_restore,
            "bad_in_a_row": self._standing.bad_in_a_row,
            "undone": self._undone,
            "careful_until": self._careful_until,
            **self._recovery.state_dict(),
            "initial_norms": dict(self._investigator.initial_norms),
            "policy": self._standing.policy.to_dict(),
            "streams": self._monitors.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it before :meth:`start`."""
        self._standing.step = int(state["step"])
        self._keeper.count_from(self._standing.step)
        self.non_finite = int(state["non_finite"])
        self._standing.healthy_steps = int(state["healthy_steps"])
        self._standing.healthy_since_restore = state["healthy_since_restore"]
        self._standing.bad_in_a_row = int(state["bad_in_a_row"])
        # Not in the checkpoints of earlier versions.
        self._undone = int(state.get("undone", 0))
        self._careful_until = int(state.get("careful_until", 0))
        self._recovery.load_state_dict(state)
        self._investigator.initial_norms = dict(state["initial_norms"])
        self._standing.policy = PolicyState.from_dict(state["policy"])
        self._monitors.load_state_dict(state["streams"])
