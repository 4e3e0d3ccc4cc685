"""Gathers the evidence about a fault by which the policy decides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_nanguard.decide.blame import worse
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.detect.non_finite import LOSS_SCALE
from lightning_nanguard.distributed.ranks import first_over_ranks
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.measure.norms import norms
from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.learner import StateKey, describe
from lightning_nanguard.state.restore import part_of_snapshot, weights_if_room
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Comparison, Evidence, Fault, Reading


@final
class Investigator:
    """Gathers the evidence by which the policy decides. It restores all weights and rates that it changes.

    All ranks get the same evidence.

    Args:
        context: Objects and settings that the parts of the guard share.
        rehearsal: Tries learning rates on the newest batches.
        trials: Tests whether the model learns much more at a lower rate.
    """

    def __init__(self, context: GuardContext, rehearsal: Rehearsal, trials: TrialRunner) -> None:
        self._context = context
        self._learner = context.learner
        self._ring = context.ring
        self._replay = context.replay
        self._ranks = context.ranks
        self._rehearsal = rehearsal
        self._trials = trials
        self._limits = context.thresholds.decision.evidence
        self._blame = context.thresholds.decision.blame
        self._compare_allowed = not context.settings.observe
        self._finite_compared = self._compare_allowed and context.settings.act_on == "evidence"
        self.initial_norms: dict[str, float] = {}
        # Number of times in a row that the batch was blamed, by kind and place of the fault.
        self._batches: Counter[tuple[str, str]] = Counter()

    def loss_shows_nothing(self) -> bool:
        """Whether the loss is known not to show which weights are better. With ``act_on="certain"`` no batch is run."""
        trace = self._replay.step_trace() if self._finite_compared else None
        return trace is not None and trace.own_targets

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {
            "initial_norms": dict(self.initial_norms),
            "blamed_batches": [[*key, times] for key, times in self._batches.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; checkpoints of version 0.1.0 lack all but the first key."""
        self.initial_norms = dict(state["initial_norms"])
        self._batches = Counter({(kind, place): times for kind, place, times in state.get("blamed_batches", ())})

    def conclude(self, fault: Fault, *, batch: bool) -> None:
        """Note whether the batch was found to be at fault."""
        if batch:
            self._batches[fault.kind, fault.place] += 1
        else:
            self._batches.clear()

    def is_worse(self, state: Snapshot, than: Snapshot) -> bool:
        """Whether the loss of the newest batches is clearly higher under one state than under another.

        ``False`` if that is not known, and always with several ranks, which would not compare at the same time.
        """
        if not self._finite_compared or self._ranks.world > 1:
            return False
        pairs = [pair for pair in self._rehearsal.compare_each(state, than) if math.isfinite(pair[1])]
        # Only the better half of the batches counts, since some may be corrupt. The loss unit alone sets no limit.
        better = sorted(pairs, key=itemgetter(1))[: math.ceil(len(pairs) / 2)]
        unit = self._context.monitors.loss_unit()
        least = min(self._limits.nothing * unit, self._limits.nothing)
        return bool(better) and all(
            not now <= then + max(least, self._limits.clearly_worse * min(unit, abs(then))) for now, then in better
        )

    def _known_to_be_the_batch(self, fault: Fault, known: Evidence, history: ReadingHistory) -> bool:
        # A corrupt sample comes back in every epoch. A single fault among healthy updates is blamed on the batch again.
        # If that is wrong, the next update is faulty too and is examined.
        times = self._batches[fault.kind, fault.place]
        again = times > self._limits.known_batches and times & (times - 1) != 0
        return again and known.bad_in_a_row == 1 and not known.undo and not history.climbing()

    def look_into(
        self, found: FoundFault, known: Evidence, *, at_hand: bool, before: Mapping[str, Tensor]
    ) -> tuple[Evidence, tuple[int, ...]]:
        """Complete the evidence. A suspicion may begin a trial.

        Args:
            found: The fault that was found.
            known: The counts of the guard.
            at_hand: Whether the present batch is the faulty one.
            before: Buffers as they were before the faulty batch, if the batch has not been undone.

        Returns:
            The evidence; and the ranks whose state or batch is not finite, if not all are concerned.
        """
        fault, reading = found.fault, found.reading
        history = self._context.monitors.history(reading.optimizer_index)
        target = self._ring.good(history.loss_unit())
        leaves = self._learner.leaves()
        unchanged = [(key, before.get(key[1], leaf) if key[0] == "buffer" else leaf) for key, leaf in leaves]
        # If the faulty update was made, bad weights now do not prove that the weights were bad before it.
        bad, corrupted = (
            (None, ()) if known.undo else first_over_ranks(self._ranks, self._context.finite.corrupt(unchanged))
        )
        batch_finite, spoilt = self._batch_finite() if at_hand else (None, ())
        finite = reading.finite and reading.loss_finite and not fault.only_if_corrupt
        if bad is None and not (known.undo or finite or batch_finite is False):
            bad, corrupted = first_over_ranks(self._ranks, self._spoilt_buffer(unchanged, at_hand=at_hand))
        known = replace(
            known,
            corrupt=bad,
            alone=self._bad_alone(fault, unchanged, bad),
            batch_finite=batch_finite,
            batch_strange=self._batch_strange() if at_hand and batch_finite is not False else None,
            comparable=self._replay.comparable(),
            clippable=reading.optimizer_index not in self._learner.quasi_newton,
            levels=tuple(snapshot.level for snapshot in self._ring.certified),
        )
        known = self._look_at_weights(found, history, known, target, at_hand=at_hand)
        return self._look_at_rates(fault, history, known, target), corrupted or spoilt

    def _spoilt_buffer(self, leaves: list[tuple[StateKey, Any]], *, at_hand: bool) -> str | None:
        """Name of a buffer of the module's own that makes the loss of the present batch bad."""
        newest, finite = self._ring.newest(), self._context.finite
        if newest is None:
            return None
        newest.wait()
        spoilt = finite.spoilt_buffer(leaves, newest.leaves)
        if spoilt is None or not at_hand or self._context.many or self._context.settings.observe:
            return spoilt

        def is_own(key: StateKey) -> bool:
            return key[0] == "buffer" and key[1] in finite.own

        mine = weights_if_room(self._learner, is_own, newest.device())
        if mine is None:
            return spoilt
        with part_of_snapshot(self._learner, newest, mine, is_own):
            loss = self._replay.probe()
        # If the loss is bad with the buffers of the snapshot, too, the batch is at fault.
        return spoilt if loss is None or math.isfinite(loss) else None

    def _bad_alone(
        self, fault: Fault, leaves: list[tuple[StateKey, Any]], bad: str | None
    ) -> Literal["averages", "scale"] | None:
        if bad is None and fault.place == LOSS_SCALE:
            return "scale"
        return "averages" if self._averages_alone(fault, leaves, bad) else None

    def _averages_alone(self, fault: Fault, leaves: list[tuple[StateKey, Any]], bad: str | None) -> bool:
        """Whether only averages are bad: copies of the weights, untrained parameters, or running statistics.

        No update of the learner is made from these.
        """
        if not (bad or fault.scope == "state"):
            return False
        averages = {key for key, _ in leaves if key[0] == "average"}
        good = self._ring.last_certified
        if good is not None:
            averages |= self._learner.untrained().keys()
        if bad is not None and good is not None and self._ranks.world == 1:
            good.wait()
            idle = self._learner.idle_statistics(good.leaves)
            # A batch whose statistics overflow may have changed the weights, too. NaN and a negative variance do not
            # come from a batch with a finite loss.
            averages |= {key for key, leaf in leaves if key in idle and not bool(torch.isinf(leaf).any())}
        others = self._context.finite.corrupt((key, leaf) for key, leaf in leaves if key not in averages)
        average = any((bad or fault.place).endswith(describe(key)) for key in averages)
        answers = self._ranks.gather((others is not None, average))
        return any(one[1] for one in answers) and not any(one[0] for one in answers)

    def _look_at_weights(
        self, found: FoundFault, history: ReadingHistory, known: Evidence, target: Snapshot | None, *, at_hand: bool
    ) -> Evidence:
        fault = found.fault
        # The weights are not examined if the batch is clearly at fault.
        if fault.scope == "batch" and (known.batch_finite is False or known.batch_strange is True):
            return known
        growth = self.growth()
        # Weights that are not finite need no comparison. A buffer may be bad because of a weight that is far too large.
        if target is None or not (known.corrupt or "buffer ").startswith("buffer "):
            return replace(known, growth=growth)
        target = self._ranks.join_snapshot(target)
        jump = None if known.undo else first_over_ranks(self._ranks, self._jump(target))[0]
        known = replace(known, growth=growth, jump=jump)
        if not self._compare_allowed or known.corrupt is not None:
            return known
        if fault.scope == "learner":
            return known if fault.proof == "none" else self._try(found, known, target)
        if (
            known.batch_finite is not False  # else its loss says nothing about the weights
            and not found.line_search  # the weights of the run are not those with which it is bad
            and not self._known_to_be_the_batch(fault, known, history)
        ):
            compared = self._compare(fault, found.reading, target, undo=known.undo, at_hand=at_hand)
            blamed, alone = self._blames_learner(fault, known, compared), known.bad_in_a_row % self._blame.patience != 0
            if compared is not None and blamed:
                compared = replace(compared, holds_elsewhere=self._holds_elsewhere(target, alone=alone))
            return replace(known, comparison=compared)
        return known

    def _try(self, found: FoundFault, known: Evidence, best: Snapshot) -> Evidence:
        self._trials.pursue(found, self._ranks.join_snapshot(self._ring.certified[-1]), best)
        return known if found.shown is None else replace(known, trial=found.shown.trial)

    def _look_at_rates(
        self, fault: Fault, history: ReadingHistory, known: Evidence, target: Snapshot | None
    ) -> Evidence:
        effective = self._context.rate.effective()
        rate = next(iter(effective), None)
        since = target.step if target is not None else 0
        before = None if target is None else target.rate
        rates, told = self._context.state.rates, self._context.state.told
        return replace(
            known,
            first=history.first if history.first is not None else 0.0,
            loss_unit=history.loss_unit(),
            climbing=history.climbing(),
            burst=fault.scope == "learner" and history.burst(),
            usual_norm=history.usual_norm(),
            rate_rose=rate is not None and before is not None and rate > self._blame.rate_risen * before,
            lr=rate,
            highest_lr=max((one for step, one in rates if step >= since), default=rate),
            first_lr=self._context.state.first_rate,
            lowest_lr=min((one for _, one in rates), default=rate),
            group_lr=max(effective, default=None),
            multiplier=self._context.rate.ratio(),
            redo_cause=self._context.state.redo_cause,
            told="" if told is None or told[0] < since else told[1],
        )

    def _compare(
        self, fault: Fault, reading: Reading, target: Snapshot, *, undo: bool, at_hand: bool
    ) -> Comparison | None:
        if reading.loss is None:
            return None
        # Measure the loss again: the reading may belong to another micro-batch, or to older weights.
        now = self._replay.probe()
        if now is None:
            return None
        by_chance = at_hand and not (undo or reading.loss_finite) and (math.isfinite(now) or self._depends_on_draws())
        if undo:
            # The question is whether the weights were bad before the faulty update, which may have made them worse. So
            # the lower of the loss now and the loss read before that update counts.
            now = min(filter(math.isfinite, (now, reading.loss)), default=now)
        mine = weights_if_room(self._learner)
        if not all(self._ranks.gather(mine is not None)) or mine is None:
            return None
        with part_of_snapshot(self._learner, target, mine):
            then = self._replay.probe()
            differentiated = fault.scope == "batch" and reading.loss_finite and not reading.finite and then is not None
            then_finite = self._replay.gradient_finite() if differentiated else None
        if then is None:
            return None
        # A fault that does not come back says nothing about the weights.
        return Comparison(then if by_chance else now, then, then_finite)

    def _depends_on_draws(self) -> bool:
        """Whether the present batch has a finite loss under the same weights with other random numbers."""
        redrawn = self._replay.probe(redrawn=True)
        return redrawn is not None and math.isfinite(redrawn)

    def _blames_learner(self, fault: Fault, known: Evidence, found: Comparison | None) -> bool:
        """Whether the weights are to blame, by the loss of this batch or because several batches in a row were bad."""
        if found is None or not fault.certain or known.undo or not math.isfinite(found.then):
            return False
        least = self._blame.worse_for_batch * self._context.monitors.loss_unit()
        return known.bad_in_a_row % self._blame.patience == 0 or worse(found, least)

    def _holds_elsewhere(self, target: Snapshot, *, alone: bool) -> bool | None:
        """Whether the present weights do no worse than older ones on most of the newest healthy batches.

        Args:
            target: The older weights.
            alone: Whether few batches in a row were bad. Then the present weights count as worse only if they clearly
                are.
        """
        least = self._blame.worse_for_batch * self._context.monitors.loss_unit() * alone
        with self._rehearsal.present() as present:
            pairs = [] if present is None else self._rehearsal.compare_each(present, target)
        holds = sum(math.isfinite(now) and now - then <= least for now, then in pairs)
        answers = self._ranks.gather(2 * holds > len(pairs) if pairs else None)
        return None if None in answers else all(answers)

    def _batch_strange(self) -> bool | None:
        answers = self._ranks.gather(self._replay.batch_strange())
        return True if True in answers else (None if None in answers else False)

    def _batch_finite(self) -> tuple[bool | None, tuple[int, ...]]:
        answers = self._ranks.gather(self._replay.batch_finite())
        bad = tuple(rank for rank, answer in enumerate(answers) if answer is False)
        if bad:
            return False, bad if len(bad) < len(answers) else ()
        return (None if None in answers else True), ()

    def _jump(self, target: Snapshot) -> str | None:
        then = [leaf for path, leaf in target.leaves.items() if path[0] == "parameter" and leaf.is_floating_point()]
        jump = self._limits.jump
        limit = max(jump, jump * max(filter(math.isfinite, norms(then, math.inf)), default=math.inf))
        weights = [
            (path, leaf)
            for path, leaf in self._learner.weights()
            if path[0] == "parameter" and leaf.is_floating_point()
        ]
        largest = norms([leaf for _, leaf in weights], math.inf)
        return next((describe(path) for (path, _), norm in zip(weights, largest, strict=True) if norm > limit), None)

    def growth(self) -> float:
        """The largest ratio of a weight matrix's norm to its norm at the start, over all ranks."""
        return float(max(self._ranks.gather(self._growth())))

    def _growth(self) -> float:
        begun = self.initial_norms
        untrained = self._learner.untrained()  # its size says nothing about the rate
        matrices = _matrices(one for one in self._learner.weights() if one[0] not in untrained)
        now = zip(matrices, norms(list(matrices.values())), strict=True)  # read from the device at once
        ratios = [norm / before for name, norm in now if (before := begun.get(name, 0.0)) > 0]
        return max((ratio for ratio in ratios if not math.isnan(ratio)), default=1.0)  # NaN is no growth


def norms_to_grow_from(leaves: Iterable[tuple[StateKey, Any]]) -> dict[str, float]:
    """The norm of each weight matrix from which its growth is measured, at least ``sqrt(rows / 3)``.

    ``torch.nn.Linear`` is initialised with about that norm. A matrix that starts near 0, such as an adapter, grows to
    many times its norm in healthy runs. A matrix that starts at exactly 0 gets 0 and is not measured.
    """
    matrices = _matrices(leaves)
    begun = zip(matrices.items(), norms(list(matrices.values())), strict=True)
    # Growth cannot be measured for a matrix of zeros, such as position embeddings, or for a mask of -inf.
    return {
        name: max(norm, math.sqrt(matrix.shape[0] / 3)) if 0 < norm < math.inf else 0.0
        for (name, matrix), norm in begun
    }


def _matrices(leaves: Iterable[tuple[StateKey, Any]]) -> dict[str, Tensor]:
    return {
        path[1]: leaf
        for path, leaf in leaves
        if path[0] == "parameter" and isinstance(leaf, Tensor) and is_strided(local(leaf)) and leaf.dim() >= 2
    }
