"""Takes snapshots, chooses where they are kept, and checks them before they are certified."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from lightning_nanguard.distributed.report import Report
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.snapshot_agreement import SnapshotAgreement
from lightning_nanguard.state.device import DeviceTimer
from lightning_nanguard.state.interval import Interval
from lightning_nanguard.state.learner import StateKey, describe
from lightning_nanguard.state.moment_bound import MomentScreen
from lightning_nanguard.state.norm_screen import NormScreen
from lightning_nanguard.state.plausibility import PlausibilityCheck
from lightning_nanguard.state.restore import average_of, bad_averages
from lightning_nanguard.state.snapshot import Snapshot, clone
from lightning_nanguard.state.snapshot_placement import SnapshotPlacement
from lightning_nanguard.types import Fault

_logger = logging.getLogger("lightning_nanguard")


@final
class SnapshotManager:
    """Takes snapshots of the learner, chooses where they are kept, and checks them before they are certified.

    Args:
        context: Objects and settings that the parts of the guard share.
        plausibility: Finds finite tensors that are far out of range.

    Attributes:
        placement: Where snapshots are kept.
    """

    def __init__(self, context: GuardContext, plausibility: PlausibilityCheck) -> None:
        settings, limits, learner = context.settings, context.thresholds.snapshots, context.learner
        self._state = context.state
        self._ranks = context.ranks
        self._many = context.many
        self._learner = learner
        self._ring = context.ring
        self._finite = context.finite
        self._plausibility = plausibility
        self._clock = settings.clock
        self._interval = Interval(settings.snapshot_every, limits.interval, settings.clock)
        self.placement = SnapshotPlacement(
            learner,
            context.ring,
            settings.snapshot_device,
            choose=settings.choose_place,
            alone=not self._many,
            sharers=self._ranks.sharers,
            parts=self._ranks.snapshot_parts,
            limit=settings.snapshot_bytes,
            others=context.replay.bytes_kept,
            thresholds=limits.placement,
        )
        self._agreement = SnapshotAgreement(self._ranks, self._interval.updates)
        self._device_timer = DeviceTimer(learner.device)
        self._screen, self._moments = NormScreen(()), MomentScreen({})
        # State keys of tensors whose norm may be larger than the largest value that one element may have.
        self._wide: set[StateKey] = set()
        self._resumed: Mapping[str, Any] | None = None
        self._last = 0
        # The newest update whose state was checked.
        self._looked = 0
        self._next = self._interval.until_next(0)
        self._wanted = False
        self._measured = 0
        self._announced_after = limits.interval.announced_after

    def count_from(self, step: int) -> None:
        """Make the next snapshot due one interval after update ``step``."""
        self._last = step
        self._next = step + self._interval.until_next(step, self._agreement.interval if self._many else None)

    def restored(self, step: int) -> None:
        """Note a rollback after update ``step``. The next snapshot is due one interval later."""
        self._interval.restored(step)
        self.count_from(step)

    def state_dict(self) -> dict[str, Any]:
        """When snapshots are due, and the counts of the pending one. The snapshots themselves are not saved."""
        if self._resumed is not None:  # loaded, and not started yet
            return dict(self._resumed)
        pending = self._ring.pending
        return {
            "interval": self._interval.state_dict(),
            "due": [self._last, self._next],
            "pending": None if pending is None else [pending.rate, pending.healthy],
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`state_dict`; checkpoints of version 0.1.0 have ``None``."""
        self._resumed = state
        if state is not None:
            self._interval.resume(state["interval"])

    def resume(self, level: float | None, capture: Callable[[], Snapshot | None]) -> bool:
        """Continue with snapshots like the run that was stopped; return whether this fit resumes one.

        The loaded state is certified at once, because it was checked when it was saved. A second copy of it takes the
        place of the pending snapshot, with the saved rate and count. So that snapshot is certified at the same update
        as without the stop.

        Args:
            level: Level of the loss.
            capture: Takes a snapshot.
        """
        resumed, self._resumed = self._resumed, None
        # Several ranks certify together, and no rank has reported yet.
        if resumed is None or self._many:
            return False
        first = capture()
        if first is None:
            return False
        first.typical, first.level = self._screen.typical, level
        self._plausibility.moments.exempt(self._moments)
        self._ring.certify()
        if resumed["pending"] is not None:
            pending = capture()
            if pending is not None:
                pending.rate, pending.healthy = resumed["pending"]
        self._last, self._next = map(int, resumed["due"])
        return True

    def want(self) -> None:
        """Make the next snapshot due at once."""
        self._wanted = True

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``, if none is pending."""
        return self._wanted or step >= self._next

    def look_due(self, step: int) -> bool:
        """Whether the last check is half an interval ago. Checks then cost at most as much as snapshots.

        Several ranks check only their snapshots, because with uneven data they are not at the same update.
        """
        old = 2 * (step - self._looked) >= self._interval.updates
        return old and not self._many and bool(self._ring.certified)

    def look(self) -> Fault | None:
        """Why a snapshot of the present state could not be certified; ``None`` if it could. No copy is made."""
        self._looked = self._state.step
        leaves = dict(self._learner.leaves())
        return self._fault_in(leaves, *self._screens(leaves))

    def close(self) -> None:
        """Release all snapshots and their memory."""
        self._ring.clear()
        self.placement.close()

    def look_at_room(self) -> None:
        """Keep fewer snapshots, or move them, if the run needs more memory than before.

        It decides nothing before the first measured snapshot.
        """
        if self._measured:
            self.placement.look_at_room()

    def capture(self, step: int, global_step: int, rate: float | None) -> Snapshot | None:
        """Take a snapshot and make it the pending one; ``None`` if there is no room for it.

        Args:
            step: The guard's clock.
            global_step: ``global_step`` of the trainer.
            rate: Effective learning rate of the first group.
        """
        started, since = self._clock(), step - self._last
        self._ring.drop_pending()
        self._wanted = False
        leaves = dict(self._learner.leaves())
        if since > 0:
            self.placement.look_at_room(leaves)
        pinned = self._learner.device.pinning
        self._device_timer = self._learner.device.timer(leaves.values())
        # Copies in the background only without other ranks: one rank alone may see that its copy was disturbed.
        snapshot = self.placement.copy(step, global_step, leaves, beside_run=since > 0 and not self._many)
        if snapshot is None:
            self.count_from(step)
            return None
        snapshot.rate = rate
        self._ring.add(snapshot)
        # Measure the live state, which equals the snapshot: the copy may be in host memory, and not have arrived yet.
        self._screen, self._moments = self._screens(leaves)
        if self._many:
            self._agreement.judge(snapshot, leaves, self._check(snapshot))
        self._device_timer.stop()
        if since > 0:
            self._interval.measure(started, since, step, self._learner.device.pinning - pinned)
            self._announce(snapshot)
        self.count_from(step)
        return snapshot

    def continue_from(self, state: Snapshot) -> None:
        """The run goes on from a state that was trained beside it. Later states are compared with this one."""
        state.wait()
        state.typical = self._screens(state.leaves)[0].typical
        self._ring.beside = state

    def tell(self) -> tuple[int, int, bool, int, int]:
        """For a :class:`Report`: the interval chosen here, then the values of :meth:`SnapshotAgreement.tell`."""
        return self._interval.updates, *self._agreement.tell()

    def hear(self, reports: Sequence[Report]) -> None:
        """Take the reports of all ranks about their snapshots."""
        self.placement.hear([one.snapshot_place for one in reports])
        if self._agreement.hear(reports):
            self.count_from(self._last)

    def judged(self, pending: Snapshot) -> bool:
        """Whether ``pending`` has been checked on all ranks. At first this does not wait for the check."""
        if self._many:
            return self._agreement.judged(pending)
        # Some updates later the check is worth a wait: a run without a certified state cannot be restored.
        overdue = pending.healthy > self._ring.certify_after + 1
        return overdue or (self._screen.arrived() and self._moments.arrived() and pending.check.arrived())

    def is_whole(self, pending: Snapshot) -> bool:
        """Whether nothing wrote to the learner while it was copied. If something did, a new snapshot is due at once."""
        whole = pending.intact() if pending.check.events else True
        if not whole:
            self.placement.torn()
            self._wanted = True
        return whole

    def objection(self, pending: Snapshot) -> tuple[Fault | None, tuple[int, ...]]:
        """Why ``pending`` cannot be certified, ``None`` if it can, and the ranks concerned."""
        if self._many:
            return self._agreement.objection(pending)
        started = self._clock()
        waited, took = self.placement.waited(), self._device_timer.seconds()
        if waited is not None and took is not None:
            self._interval.took_device(took + waited)
        self._looked = max(self._looked, pending.step)
        fault = self._check(pending)
        self._interval.certified(self._clock() - started)
        return fault, ()

    def mend_pending(self, place: str) -> None:
        """Drop the pending snapshot if it is bad. If only averaged copies or untrained parts are bad, mend these.

        Bad copies are taken from the newest certified snapshot, or left out if it has none.

        Args:
            place: A tensor of it that is bad, besides those that are not finite.
        """
        pending = self._ring.pending
        if pending is None:
            return
        pending.wait()
        untrained = self._learner.untrained()
        averages = {key: leaf for key, leaf in pending.leaves.items() if average_of(key, untrained) is not None}
        rest = [(key, leaf) for key, leaf in pending.leaves.items() if key not in averages]
        if self._many or any(describe(key) == place for key, _ in rest) or self._finite.corrupt(rest):
            self._ring.drop_pending()
            return
        bad = bad_averages(averages.items(), self._finite.corrupt, place, untrained)
        certified = self._ring.last_certified
        newest = {} if certified is None else certified.leaves
        for key in [key for key in averages if average_of(key, untrained) in bad]:
            if key in newest:
                pending.leaves[key] = clone(newest[key], None)
            else:
                del pending.leaves[key]

    def kept(self, pending: Snapshot) -> Snapshot:
        """The certified snapshot as it is kept: split among the ranks if it was equal on all of them."""
        if not self._agreement.share():
            return pending
        started = self._clock()
        pending.wait()
        shared = self._ranks.split_snapshot(pending)
        self._interval.certified(self._clock() - started)
        return shared

    def _screens(self, leaves: Mapping[StateKey, Any]) -> tuple[NormScreen, MomentScreen]:
        leaves = self._finite.sized(leaves)
        norms = NormScreen(self._finite.to_be_finite(leaves.items()), self._wide, self._learner.device)
        return norms, self._plausibility.moments.screen(leaves)

    def _check(self, pending: Snapshot) -> Fault | None:
        pending.typical = self._screen.typical
        certified = self._ring.last_certified
        before = {} if certified is None else certified.typical
        self.placement.unchanged = {key for key, size in pending.typical.items() if before.get(key) == size}
        if certified is None:
            self._plausibility.moments.exempt(self._moments)
        return self._fault_in(pending.leaves, self._screen, self._moments, pending)

    def _fault_in(
        self,
        leaves: Mapping[StateKey, Any],
        screen: NormScreen,
        moments: MomentScreen,
        pending: Snapshot | None = None,
    ) -> Fault | None:
        origin = self._ring.origin()
        before = {} if origin is None else origin.typical
        beyond = self._plausibility.screen(screen, before, self._state.healthy_steps)
        self._wide |= beyond
        if not (self._plausibility.moments.beyond(moments) or beyond):
            return None
        if pending is not None:
            pending.wait()
        bad = self._finite.corrupt(leaves.items())
        if bad is not None:
            message = f"{bad} is no longer finite, although every loss and gradient is"
            return Fault("corrupted_state", "state", bad, None, message)
        return self._plausibility.implausible(self._finite.sized(leaves), self._state.healthy_steps, pending)

    def _announce(self, snapshot: Snapshot) -> None:
        self._measured += 1
        if self._measured == self._announced_after and self._ranks.rank == 0:
            _logger.info(
                "NaNGuard: a snapshot of %.4g MB is taken every %d updates, %s. Up to %d are kept. To change this, set "
                "snapshot_every_n_steps, snapshot_device, max_snapshots or max_snapshot_memory.",
                snapshot.nbytes() / 1e6,
                self._interval.updates,
                "on the device of the weights" if self.placement.beside else "in host memory",
                self._ring.capacity + 1,
            )
