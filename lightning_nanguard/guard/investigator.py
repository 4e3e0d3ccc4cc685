"""Looking into a fault: gathering the evidence that the policy decides on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.distributed.ranks import Ranks, SingleProcess, first_over_ranks
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.state.finite import allowances, corrupt, to_be_finite
from lightning_nanguard.state.learner import Learner, StateKey, describe
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.types import Comparison, Evidence, Fault, Reading


class Witness(Protocol):
    """What can be asked about the batch at hand."""

    def batch_finite(self) -> bool | None:
        """Whether the batch at hand is finite; ``None`` where it holds no floating numbers or is not at hand."""

    def batch_strange(self) -> bool | None:
        """Whether the batch at hand reaches far beyond those before it; ``None`` where that cannot be told."""

    def comparable(self) -> bool:
        """Whether a batch can be run again at all."""

    def gradient_finite(self) -> bool | None:
        """Whether the batch at hand has a finite gradient under the weights of now; ``None`` where it cannot be had.

        Gradients are gone afterwards.
        """

    def probe(self) -> float | None:
        """Loss of the batch at hand under the weights of now, leaving no trace; ``None`` where it cannot be had."""


# No update that is let through makes a weight this many times larger than all were a few snapshots ago.
_JUMP = 1e4


# So often in a row a fault must have been its batch's before that is taken for granted, if it comes alone.
_SURE = 4


# Below this growth of its matrices a loss that does not fall is a hard task, and nothing is tried out.
_GROWN = 2.5


_GROWN_AND_LEARNED = 6.0


# A loss that is higher by this share of another, or of the loss unit, is clearly higher; less than this is nothing.
_CLEARLY = 0.3


_NOTHING = 0.01


@final
class Investigator:
    """Gathers evidence; it changes nothing that it does not put back.

    Args:
        learner: What is trained.
        ring: The snapshots.
        rate: The learning rate's multiplier.
        witness: The loop around.
        rehearsal: Tries rates out.
        compare: Whether a batch may be run again under older weights.
        ranks: All processes; what is found out here is the same on all of them.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        rate: LearningRate,
        witness: Witness,
        rehearsal: Rehearsal,
        *,
        compare: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks: Ranks = SingleProcess() if ranks is None else ranks
        self._rehearsal = rehearsal
        self._learner = learner
        self._ring = ring
        self._rate = rate
        self._witness = witness
        self._compare_allowed = compare
        self.allowed: dict[StateKey, Tensor] = {}
        self._shapes: dict[StateKey, torch.Size] = {}
        self.initial_norms: dict[str, float] = {}
        # How often in a row each kind of fault at each place was its batch's.
        self._batches: Counter[tuple[str, str]] = Counter()

    def begin(self) -> None:
        """Note what is not finite by design."""
        weights = [*self._learner.weights()]
        self.allowed = allowances(weights)
        self._shapes = {path: leaf.shape for path, leaf in weights if path[0] == "buffer"}

    def to_be_finite(self, leaves: Iterable[tuple[StateKey, Any]]) -> Iterator[tuple[StateKey, Tensor]]:
        """What :meth:`corrupt` looks at, in tensors that are finite if nothing is wrong."""
        return to_be_finite(leaves, self.allowed, self._shapes)

    def corrupt(self, leaves: Iterable[tuple[StateKey, Any]]) -> str | None:
        """Name of the first tensor that is not finite and was at the start of fit."""
        return corrupt(leaves, self.allowed, self._shapes)

    def conclude(self, fault: Fault, *, batch: bool) -> None:
        """A fault was found to be its batch's, or not."""
        if batch:
            self._batches[fault.kind, fault.place] += 1
        else:
            self._batches.clear()

    def is_worse(self, state: Snapshot, than: Snapshot) -> bool:
        """Whether the newest batches fare clearly worse under one state than under another.

        ``False`` where that cannot be told. Among ranks it is not asked: each would ask at a time of its own.
        """
        if not self._compare_allowed or self._ranks.world > 1:
            return False
        pairs = [pair for pair in self._rehearsal.compare_each(state, than) if math.isfinite(pair[1])]
        # By the better half, and not by the loss unit alone: some, and what the run began with, may be corrupt.
        better = sorted(pairs, key=itemgetter(1))[: math.ceil(len(pairs) / 2)]
        unit = self._rehearsal.loss_unit()
        least = min(_NOTHING * unit, _NOTHING)
        return bool(better) and all(
            not now <= then + max(least, _CLEARLY * min(unit, abs(then))) for now, then in better
        )

    def _known_to_be_the_batch(self, fault: Fault, known: Evidence, history: ReadingHistory) -> bool:
        # A corrupt sample comes back in every epoch. Alone among healthy updates it is what it was before; if not, the
        # next update is faulty too, and then it is looked into.
        times = self._batches[fault.kind, fault.place]
        again = times > _SURE and times & (times - 1) != 0
        return again and known.bad_in_a_row == 1 and not known.undo and not history.climbing()

    def look_into(
        self,
        fault: Fault,
        reading: Reading,
        history: ReadingHistory,
        known: Evidence,
        *,
        at_hand: bool,
        before: Mapping[str, Tensor],
        rates: Iterable[tuple[int, float]] = (),
    ) -> Evidence:
        """Complete what the engine knows.

        Args:
            fault: What was found.
            reading: The reading it was found in.
            history: History of its optimizer_index.
            known: The engine's own counts.
            at_hand: Whether the batch at hand is the faulty one.
            before: Buffers as they were before the faulty batch, where it has not been undone.
            rates: Effective learning rate of the first group after each step at which it changed.
        """
        sound = self._sound(fault)
        target = self._ring.good(sound, history.loss_unit())
        leaves = self._learner.leaves()
        untouched = ((path, before.get(path[1], leaf) if path[0] == "buffer" else leaf) for path, leaf in leaves)
        # Where the faulty update was made, what is bad now says nothing of what was before it.
        bad, corrupted = (None, ()) if known.undo else first_over_ranks(self._ranks, self.corrupt(untouched))
        batch_finite, spoilt = self._batch_finite() if at_hand else (None, ())
        strange = self._batch_strange() if at_hand and batch_finite is not False else None
        # Nothing about the weights is asked for a batch that is plainly at fault.
        blameless = fault.scope == "batch" and (batch_finite is False or strange is True)
        growth = 1.0 if blameless else max(self._ranks.gather(self._growth()))
        comparison = jump = lower_is_better = None
        # Weights that are not finite are compared with nothing: the answer is plain already.
        if target is not None and bad is None and not blameless:
            target = self._ranks.join_snapshot(target)
            if fault.since is not None and sound is not None:
                growth = max(self._ranks.gather(self._growth(target)))
            if not known.undo:
                jump, _ = first_over_ranks(self._ranks, self._jump(target))
            if self._compare_allowed and fault.kind == "stuck_loss":
                if growth > self._least_growth(fault, history):
                    lower_is_better = self._rehearsal.lower_rate_is_better(target, history.loss_unit())
            elif (
                self._compare_allowed
                and fault.since is None  # this batch may be as good as any
                and batch_finite is not False  # under any weights it would say nothing
                and not self._known_to_be_the_batch(fault, known, history)
            ):
                comparison = self._compare(fault, reading, target, undo=known.undo)
        effective = self._rate.effective()
        rate = effective[0] if effective else None
        since = target.step if target is not None else 0
        rates = list(rates)
        return Evidence(
            step=known.step,
            healthy_steps=known.healthy_steps,
            healthy_since_restore=known.healthy_since_restore,
            bad_in_a_row=known.bad_in_a_row,
            undo=known.undo,
            corrupt=bad,
            jump=jump,
            batch_strange=strange,
            batch_finite=batch_finite,
            comparable=self._witness.comparable(),
            clippable=reading.optimizer_index not in self._learner.quasi_newton,
            comparison=comparison,
            first=history.first if history.first is not None else 0.0,
            loss_unit=history.loss_unit(),
            growth=growth,
            lower_is_better=lower_is_better,
            excursion=history.excursion(),
            climbing=history.climbing(),
            burst=fault.scope == "learner" and history.burst(),
            rate_rose=rate is not None and target is not None and target.rate is not None and rate > 1.5 * target.rate,
            snapshots=len(self._ring.certified),
            levels=tuple(snapshot.level for snapshot in self._ring.certified),
            sound=sound,
            usual_norm=history.usual_norm(),
            lr=rate,
            highest_lr=max((one for step, one in rates if step >= since), default=rate),
            lowest_lr=min((one for _, one in rates), default=rate),
            multiplier=self._rate.ratio(),
            ranks=corrupted or spoilt,
        )

    def _sound(self, fault: Fault) -> int | None:
        certified = self._ring.certified
        if fault.kind == "stuck_loss":
            return len(certified) - 1 if certified else None
        since = -math.inf if fault.since is None else fault.since
        return next((depth for depth, snapshot in enumerate(certified) if snapshot.step < since), None)

    def _compare(self, fault: Fault, reading: Reading, target: Snapshot, *, undo: bool) -> Comparison | None:
        if reading.loss is None:
            return None
        if fault.kind == "unsteady_loss":
            # A ruined model may be sure of single batches: several say more.
            losses = self._rehearsal.compare(target)
            return None if losses is None else Comparison(*losses)
        # Measured anew, not taken from the reading: that may be of another micro-batch, or of older weights.
        now = self._witness.probe()
        if now is None:
            return None
        if undo:
            # Weights that the bad update spoilt say nothing: those in question are older. So the better of both.
            now = min(filter(math.isfinite, (now, reading.loss)), default=now)
        try:
            mine = capture(self._learner, step=0, global_step=0, leaves=[*self._learner.weights()])
        except torch.cuda.OutOfMemoryError:
            mine = None
        if not all(self._ranks.gather(mine is not None)) or mine is None:
            return None
        restore(self._learner, target, keep=_is_weight)
        try:
            then = self._witness.probe()
            differentiated = fault.kind == "non_finite_gradient" and then is not None
            then_finite = self._witness.gradient_finite() if differentiated else None
        finally:
            restore(self._learner, mine, keep=_is_weight)
        return None if then is None else Comparison(now, then, then_finite)

    def _least_growth(self, fault: Fault, history: ReadingHistory) -> float:
        # One that has learned something may be slow: it takes more to try it.
        learned = (
            history.first is not None
            and fault.value is not None
            and fault.value < history.first - 0.3 * history.loss_unit()
        )
        return _GROWN_AND_LEARNED if learned else _GROWN

    def _batch_strange(self) -> bool | None:
        answers = self._ranks.gather(self._witness.batch_strange())
        return True if True in answers else (None if None in answers else False)

    def _batch_finite(self) -> tuple[bool | None, tuple[int, ...]]:
        answers = self._ranks.gather(self._witness.batch_finite())
        bad = tuple(rank for rank, answer in enumerate(answers) if answer is False)
        if bad:
            return False, bad if len(bad) < len(answers) else ()
        return (None if None in answers else True), ()

    def _jump(self, target: Snapshot) -> str | None:
        then = [leaf for path, leaf in target.leaves.items() if path[0] == "parameter" and leaf.is_floating_point()]
        limit = max(_JUMP, _JUMP * max(norms(then, math.inf), default=math.inf))
        weights = [
            (path, leaf)
            for path, leaf in self._learner.weights()
            if path[0] == "parameter" and leaf.is_floating_point()
        ]
        largest = norms([leaf for _, leaf in weights], math.inf)
        return next((describe(path) for (path, _), norm in zip(weights, largest, strict=True) if norm > limit), None)

    def _growth(self, since: Snapshot | None = None) -> float:
        begun = self.initial_norms if since is None else norms_to_grow_from(since.leaves.items())
        matrices = _matrices(self._learner.weights())
        now = zip(matrices, norms(list(matrices.values())), strict=True)  # read from the device at once
        ratios = [norm / before for name, norm in now if (before := begun.get(name, 0.0)) > 0]
        return max((ratio if math.isfinite(ratio) else math.inf for ratio in ratios), default=1.0)


def norms_to_grow_from(leaves: Iterable[tuple[StateKey, Any]]) -> dict[str, float]:
    """What the growth of a parameter is measured by: its norm, and no less than that of an ordinary beginning.

    One that begins at nothing, as an adapter or the last layer of a block may, grows many times over in good runs.
    ``torch.nn.Linear`` begins at a norm of ``sqrt(rows / 3)``.
    """
    matrices = _matrices(leaves)
    begun = zip(matrices.items(), norms(list(matrices.values())), strict=True)
    # From exactly 0 anything is far: such as positions, whose size their rows do not tell.
    return {name: max(norm, math.sqrt(matrix.shape[0] / 3)) if norm else 0.0 for (name, matrix), norm in begun}


def _matrices(leaves: Iterable[tuple[StateKey, Any]]) -> dict[str, Tensor]:
    return {path[1]: leaf for path, leaf in leaves if path[0] == "parameter" and leaf.dim() >= 2}


def _is_weight(path: StateKey) -> bool:
    return path[0] in ("parameter", "buffer")
