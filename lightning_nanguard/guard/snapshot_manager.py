"""When snapshots are taken, where they lie, and what speaks against certifying one."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.distributed.checksum import checksums
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess
from lightning_nanguard.distributed.report import Report, minority_ranks
from lightning_nanguard.guard.investigator import Investigator
from lightning_nanguard.state.device import DeviceMemory, SideStreamCopy
from lightning_nanguard.state.finite import jumped
from lightning_nanguard.state.interval import Interval
from lightning_nanguard.state.learner import Learner, StateKey
from lightning_nanguard.state.norm_screen import NormScreen
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture, tensor_bytes
from lightning_nanguard.types import Fault

_logger = logging.getLogger("lightning_nanguard")


# Healthy updates after which statistics and moments no longer come from their initial values, and growth from snapshot
# to snapshot beyond which they cannot be right; a weight, which an optimizer moves by its rate, grows by less than a
# second moment, which goes with the square of a gradient.
_SETTLED = 100


_FAR = 1e4


_FAR_WEIGHT = 1e3


_FAR_EARLY = 1e12


# So often the same weight may be found out of range.
_AGAIN = 3


@final
@dataclass(frozen=True, slots=True)
class SnapshotVerdict:
    """What one rank found out about the pending snapshot.

    Attributes:
        step: The snapshot's.
        objection: What speaks against it.
        checksums: Of its parameters and of its moments.
    """

    step: int = -1
    objection: Fault | None = None
    checksums: tuple[int, int] = (0, 0)


@final
class SnapshotManager:
    """Takes snapshots of the learner and looks at them before they are certified.

    Args:
        learner: What is kept.
        ring: Where snapshots go.
        investigator: Knows what is not finite by design.
        every: Updates between snapshots; ``None`` chooses so that they take at most 1 % of the time, and less later.
        device: Where snapshots lie; ``None`` beside the originals.
        choose: Whether they go to host memory by themselves where a CUDA device has no room for them.
        ranks: All processes: they take and certify the same snapshots.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        investigator: Investigator,
        *,
        every: int | None,
        device: torch.device | None,
        choose: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks: Ranks = SingleProcess() if ranks is None else ranks
        self._judgement = SnapshotVerdict()
        self._glance = NormScreen(())
        self._wide: set[StateKey] = set()
        self._still: set[StateKey] = set()
        self._heard: Sequence[Report] = ()
        self._equal = False
        self._were_equal: set[str] = set()
        self._parted_before: set[str] = set()
        self._learner = learner
        self._ring = ring
        self._investigator = investigator
        self._device = device
        self._choose = choose
        self._said = 0
        self._courier = SideStreamCopy()
        self._overlap = True
        self._taking: tuple[Any, Any] | None = None
        self._interval = Interval(every)
        self._every = self._interval.updates
        self._last = 0
        self._next = self._interval.until_next(0)
        self._wanted = False
        # What was found far out of range, and how often.
        self._jumps: Counter[str] = Counter()
        self.watches_statistics = False

    def count_from(self, step: int) -> None:
        """The next snapshot is due an interval after update ``step``."""
        self._last = step
        self._next = step + self._interval.until_next(step, None if self._ranks.world == 1 else self._every)

    def want(self) -> None:
        """The next snapshot is due at once."""
        self._wanted = True

    def due(self, step: int) -> bool:
        """Whether a snapshot should be taken after update ``step``, where none is pending."""
        return self._wanted or step >= self._next

    def capture(self, step: int, global_step: int, rate: float | None, healthy_steps: int = 0) -> Snapshot:
        """Take a snapshot, which is then pending.

        Args:
            step: The guard's clock.
            global_step: The trainer's.
            rate: Effective learning rate of the first group.
            healthy_steps: Healthy updates so far.
        """
        started, since = time.perf_counter(), step - self._last
        self._ring.drop_pending()
        self._wanted = False
        leaves = dict(self._learner.leaves())
        if since > 0 and self._choose:
            self._choose_place(leaves)
        began = _event(leaves)
        try:
            snapshot = self._copy(step, global_step, leaves, self._place(leaves))
        except torch.cuda.OutOfMemoryError:
            _logger.warning(
                "NaNGuard: the device has no room for another snapshot at step %d. From now on snapshots lie in host "
                "memory; set snapshot_device='cpu' or max_snapshot_memory to choose this from the start.",
                global_step,
            )
            if self._ranks.world == 1:
                self._ring.shed()  # else ranks would no longer hold the same snapshots
            self._device, self._choose = torch.device("cpu"), False
            snapshot = self._copy(step, global_step, leaves, self._device)
        snapshot.rate = rate
        self._ring.add(snapshot)
        # At the live state, whose values the snapshot has: it may lie far away, and not be there yet.
        self._glance = NormScreen(self._investigator.to_be_finite(leaves.items()), self._wide)
        if self._ranks.world > 1:
            snapshot.wait()
            sums = (0, 0) if self._ranks.sharded else checksums(snapshot.leaves)
            self._judgement = SnapshotVerdict(step, self._look(snapshot, healthy_steps), sums)
        if began is not None:
            self._taking = began, _event(leaves)
        if since > 0:
            self._interval.measure(started, since, step)
            self._say(snapshot)
        self.count_from(step)
        return snapshot

    def settle(self) -> None:
        """Before an update: what is still being copied must be, and must not have been written to."""
        if not self._courier.settle():
            self._ring.drop_pending()
            # Who has done so once, in forward or in a callback, does so again.
            self._overlap, self._courier = False, SideStreamCopy()

    def _choose_place(self, leaves: Mapping[StateKey, Any]) -> None:
        # After the first updates: activations have had their peak, and moments are there.
        self._choose = False
        device = _cuda(leaves)
        if device is None or self._device is not None or self._ranks.world > 1:
            return
        # One more is pending, and the one the fit began with may be there already, without its moments.
        there = sum(snapshot.nbytes() for snapshot in self._ring.certified if not snapshot.homes)
        if not DeviceMemory.of(device).fits(tensor_bytes(leaves) * (self._ring.capacity + 1) - there):
            self._device = torch.device("cpu")

    def _place(self, leaves: Mapping[StateKey, Any]) -> torch.device | None:
        device = _cuda(leaves)
        if device is None or not self._choose or self._device is not None or self._ranks.world > 1:
            return self._device
        # What room there is shows only after the first updates, which may need it all.
        return None if DeviceMemory.of(device).is_negligible(tensor_bytes(leaves)) else torch.device("cpu")

    def _say(self, snapshot: Snapshot) -> None:
        # Twice measured, the interval stands.
        self._said += 1
        if self._said == 2 and self._ranks.rank == 0:
            _logger.info(
                "NaNGuard: a snapshot of %.4g MB every %d updates, %s; up to %d of them. Set snapshot_every_n_steps, "
                "snapshot_device and max_snapshots or max_snapshot_memory to choose otherwise.",
                snapshot.nbytes() / 1e6,
                self._interval.updates,
                "beside the weights" if self._device is None else "in host memory",
                self._ring.capacity + 1,
            )

    def tell(self) -> tuple[int, int, bool, int, int]:
        """For a :class:`Report`: the interval chosen here, and what was found out about the pending snapshot."""
        mine = self._judgement
        return self._interval.updates, mine.step, mine.objection is not None, *mine.checksums

    def hear(self, reports: Sequence[Report]) -> None:
        """Take what all ranks say: the longest interval holds."""
        self._heard = reports
        every = max([one.snapshot_interval for one in reports])
        if every != self._every:
            self._every = every
            self.count_from(self._last)

    def judged(self, pending: Snapshot) -> bool:
        """Whether it is known, on all ranks, what to think of ``pending``."""
        if self._ranks.world == 1:
            return self._glance.arrived()
        return all(one.pending_step == pending.step for one in self._heard)

    def _copy(
        self, step: int, global_step: int, leaves: Mapping[StateKey, Any], device: torch.device | None
    ) -> Snapshot:
        take = partial(
            capture, self._learner, step=step, global_step=global_step, device=device, reuse=self._ring.spare()
        )
        on_cuda = {leaf.device for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.is_cuda}
        if device is None or device.type != "cpu" or not on_cuda:
            return take(leaves=leaves.items())
        if not self._overlap:
            snapshot = take(leaves=leaves.items())
            snapshot.done = [torch.cuda.current_stream(one).record_event() for one in on_cuda]
            return snapshot
        soon = [(path, leaf) for path, leaf in leaves.items() if self._changes_soon(path, leaf)]
        later = [(path, leaf) for path, leaf in leaves.items() if not self._changes_soon(path, leaf)]
        snapshot = take(leaves=soon)

        def copy() -> None:
            rest = take(leaves=later)
            snapshot.leaves.update(rest.leaves)
            snapshot.homes.update(rest.homes)

        snapshot.done = self._courier.send(copy, [leaf for _, leaf in later if isinstance(leaf, Tensor)])
        return snapshot

    def _changes_soon(self, path: StateKey, leaf: Any) -> bool:
        # Forward writes to buffers, and others to averages and to a teacher, before the next update.
        frozen = path[0] == "parameter" and not leaf.requires_grad
        return path[0] in ("buffer", "average") or (frozen and path not in self._still)

    def _look(self, pending: Snapshot, healthy_steps: int) -> Fault | None:
        pending.typical = self._glance.typical
        before = self._ring.certified[0].typical if self._ring.certified else {}
        self._still = {path for path, size in pending.typical.items() if before.get(path) == size}
        beyond = self._glance.beyond(before, _FAR_WEIGHT)
        if healthy_steps <= _SETTLED:
            # Moments still come from their initial values then.
            beyond = {path for path in beyond if path[0] == "parameter"} | self._glance.beyond(before, _FAR_EARLY)
        self._wide |= beyond
        return self._objection(pending, healthy_steps) if beyond else None

    def objection(self, pending: Snapshot, healthy_steps: int) -> tuple[Fault | None, tuple[int, ...]]:
        """What speaks against certifying ``pending``, ``None`` if nothing does, and to which ranks."""
        if self._ranks.world == 1:
            started = time.perf_counter()
            waited = self._courier.waited()
            if self._taking is not None and self._taking[1].query() and waited is not None:
                self._interval.took_device(self._taking[0].elapsed_time(self._taking[1]) / 1e3 + waited)
            fault = self._look(pending, healthy_steps)
            self._interval.certified(time.perf_counter() - started)
            return fault, ()
        objecting = tuple(rank for rank, one in enumerate(self._heard) if one.rejects_pending)
        if objecting:
            mine = self._judgement.objection
            told = self._ranks.gather(None if mine is None else [mine.kind, mine.place, mine.message])
            kind, place, message = told[objecting[0]]
            return Fault(kind, "state", place, None, message), objecting
        return self._parted(pending)

    def _parted(self, pending: Snapshot) -> tuple[Fault | None, tuple[int, ...]]:
        if self._ranks.sharded:
            return None, ()
        self._equal = True
        for name, sums in (
            ("parameters", [one.parameter_checksum for one in self._heard]),
            ("optimizer state", [one.optimizer_checksum for one in self._heard]),
        ):
            if len(set(sums)) == 1:
                if sums[0]:
                    self._were_equal.add(name)
                continue
            self._equal = False
            if name not in self._were_equal:
                continue  # an optimizer that is itself shared among ranks, or parameters that were never synchronised
            self._were_equal.remove(name)
            if name not in self._parted_before:
                self._parted_before.add(name)
                message = f"the {name} of the ranks, which were equal, differ at step {pending.global_step}"
                return Fault("parted_ranks", "state", name, None, message), minority_ranks(sums)
            # What parts again after a restore does so by itself.
            if self._ranks.rank == 0:
                _logger.warning(
                    "NaNGuard: the %s of the ranks differ again at step %d; from now on each rank keeps its own "
                    "snapshots whole and goes back to them. Look for updates that are not synchronised, or for devices "
                    "of different kinds in one run.",
                    name,
                    pending.global_step,
                )
        return None, ()

    def kept(self, pending: Snapshot) -> Snapshot:
        """How a certified snapshot is kept: shared among ranks where it was found equal on all of them."""
        if self._ranks.snapshot_parts == 1 or not self._equal:
            return pending
        started = time.perf_counter()
        shared = self._ranks.split_snapshot(pending)
        self._interval.certified(time.perf_counter() - started)
        return shared

    def _objection(self, pending: Snapshot, healthy_steps: int) -> Fault | None:
        pending.wait()
        bad = self._investigator.corrupt(pending.leaves.items())
        if bad is not None:
            message = f"{bad} is no longer finite, though every loss and gradient is"
            return Fault("corrupted_state", "state", bad, None, message)
        return self.implausible(pending.leaves, healthy_steps, pending)

    def implausible(
        self, leaves: Mapping[StateKey, Any], healthy_steps: int, state: Snapshot | None = None
    ) -> Fault | None:
        """What is far out of range beside the newest certified snapshot, ``None`` if nothing is.

        Args:
            leaves: A state of the learner.
            healthy_steps: Updates accepted so far.
            state: The same as a snapshot, where there is one: what is doubtful is tried on the newest batches then.
        """
        if not self._ring.certified:
            return None
        # Layers that normalise hide what is far out of range from the loss: statistics, weights and moments alike.
        weights = {path for path in leaves if path[0] == "parameter"}
        statistics = set(self._learner.statistics(leaves))
        others = {*statistics, *(path for path in leaves if path[0] == "optimizer")}
        newest = self._ring.certified[0]
        then = newest.leaves
        sure = _far(healthy_steps, _FAR_WEIGHT)
        for names, times in ((weights, _FAR_WEIGHT), (others, _far(healthy_steps))):
            far = jumped(leaves, then, names, times)
            if far is None:
                continue
            # What comes back after a restore is how it is, and some weights have far to go at first, where data are not
            # scaled, say: then the loss decides, which tells of weights alone.
            doubtful = far in self._jumps or (times < sure and jumped(leaves, then, names, sure) is None)
            if doubtful and not (names is weights and self._is_ruin(far, state, newest)):
                continue
            self._jumps[far] += 1
            # Where it came of a batch, the next one that brings it can be skipped.
            buffers = {path for path in statistics if path[0] == "buffer"}
            self.watches_statistics |= jumped(leaves, then, buffers, _far(healthy_steps)) is not None
            return Fault("implausible_state", "state", far, None, f"{far} is over {times:g} times what it was")
        return None

    def _is_ruin(self, far: str, state: Snapshot | None, newest: Snapshot) -> bool:
        return state is not None and self._jumps[far] < _AGAIN and self._investigator.is_worse(state, newest)

    def strange_statistics(self, before: Mapping[str, Tensor], healthy_steps: int) -> Fault | None:
        """What the batch at hand has just done to running statistics, ``None`` if it may be.

        Args:
            before: Buffers as they were before the batch, by name.
            healthy_steps: Updates accepted so far.
        """
        then = {("buffer", name): tensor for name, tensor in before.items()}
        now = dict(self._learner.weights())
        far = jumped(now, then, self._learner.statistics(now), _far(healthy_steps))
        if far is None:
            return None
        message = f"this batch made {far} over {_FAR:g} times as large"
        return Fault("implausible_statistics", "batch", far, None, message)


def _far(healthy_steps: int, usual: float = _FAR) -> float:
    return usual if healthy_steps > _SETTLED else _FAR_EARLY


def _cuda(leaves: Mapping[StateKey, Any]) -> torch.device | None:
    return next((leaf.device for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.is_cuda), None)


def _event(leaves: Mapping[StateKey, Any]) -> Any:
    # What a device does takes its own time, which the host's clock does not see.
    device = _cuda(leaves)
    if device is None:
        return None
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
