"""Finds the cause of a fault: gathers clues, and asks the rules."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.batch import batch_clues, compared
from lightning_nanguard.diagnosis.case import Case, Change, Clues, EarlierFinding, Look, Model
from lightning_nanguard.diagnosis.curvature import curvature_along_update
from lightning_nanguard.diagnosis.isolation import Untraced, errors_logged, isolated, uncompiled
from lightning_nanguard.diagnosis.module_state import trained_parameters
from lightning_nanguard.diagnosis.optimizer_settings import unstable_setting
from lightning_nanguard.diagnosis.replay import gradient_fits, loss_and_gradient_norm, replay, runs_finite
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.diagnosis.rules.signs import learner_diverged, number_format_exhausted, worse_than_before
from lightning_nanguard.diagnosis.state_comparison import state_of_snapshot, unexplained_change
from lightning_nanguard.measure.finite import bad_unless_masked, non_finite_fields
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Evidence, Fault, Finding

_AS_BEFORE = "not run again; most likely as at update"


@final
class Diagnostician:
    """Finds the cause of a fault. It never raises, and undoes everything that its runs change.

    Args:
        learner: The learner.
        ring: The snapshots of the learner.
        step: Runs a micro-batch forward with its recorded random numbers. ``step(micro, full_precision)`` returns the
            loss with its graph, or ``None``.
        untraced: A context that undoes what a run changes.
        loss_scale: Scale of the GradScaler; ``None`` without one.
        low_precision: Whether the run computes in 16 bits.
        rules: The rules; ``None`` for the built-in ones.
        thresholds: When a number is evidence for a cause, and how much to run again.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        step: Callable[[MicroBatch, bool], Tensor | None],
        untraced: Untraced,
        *,
        loss_scale: Callable[[], float | None] = lambda: None,
        low_precision: bool = False,
        rules: RuleSet | None = None,
        thresholds: DiagnosisThresholds = DEFAULT,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._step = step
        self._untraced = untraced
        self._loss_scale = loss_scale
        self._low_precision = low_precision
        self._rules = RuleSet(thresholds=thresholds) if rules is None else rules
        self._thresholds = thresholds
        self._times_seen: Counter[tuple[str, str]] = Counter()
        self._earlier: deque[EarlierFinding] = deque(maxlen=thresholds.replay.findings)
        # The micro-batch that the last finding is about; None if none was examined.
        self.looked_at: MicroBatch | None = None
        # The last question (update, kind and place), the micro-batch that was examined, and the result.
        self._gathered: tuple[tuple[int, str, str], MicroBatch, Clues] | None = None

    def diagnose(
        self,
        fault: Fault,
        evidence: Evidence,
        micros: Sequence[MicroBatch],
        look: Look,
        good: Snapshot | None = None,
        healthy: Sequence[Any] = (),
    ) -> Finding | None:
        """Find the cause of a fault; ``None`` if none was found.

        Args:
            fault: The fault.
            evidence: The evidence about it.
            micros: The micro-batches of the faulty update, the newest last.
            look: How much may be examined.
            good: The good state to run the batch from. By default it is chosen from the ring.
            healthy: Healthy batches before this update. NaN and Inf in the same fields as in these are usual.
        """
        unstable = unstable_setting(self._learner.optimizers, self._thresholds.learner, evidence)
        # A second question about a fault, asked because there is more evidence, is not about a second fault.
        for one in list(self._earlier):
            if (one.step, one.fault, one.place) == (evidence.step, fault.kind, fault.place):
                self._earlier.remove(one)
        case = Case(fault, evidence, earlier=tuple(self._earlier), unstable=unstable)
        self.looked_at = None
        with errors_logged(_failed(fault)):
            good = self._ring.good_for(evidence) if good is None else good
            if look != "nothing" and micros:
                case = self._gather(case, micros, look, good, healthy)
            if fault.rate_may_cause and case.clues.moved_alone is None:
                case = self._compare_states(case, good)
            finding, before = self._rules.diagnose(case), self._as_before(case)
            # An earlier finding from a run of the batch is better than a guess without one.
            if finding is None or (before is not None and finding.confidence <= self._thresholds.confidence.told):
                return before
            self._earlier.append(EarlierFinding(evidence.step, fault.kind, fault.place, finding, evidence.lr))
            return finding
        return None

    def _as_before(self, case: Case) -> Finding | None:
        """The earlier finding, if the batch was not run again this time and nothing was found."""
        here = case.earlier_here()
        if case.clues.replayed or not here:
            return None
        last = here[-1]
        text = f"{_AS_BEFORE} {last.step}, where {last.finding.suggestion}"
        sure = last.finding.confidence * self._thresholds.replay.fading
        return replace(last.finding, confidence=sure, samples=(), suggestion=text)

    def _gather(
        self, case: Case, micros: Sequence[MicroBatch], look: Look, good: Snapshot | None, healthy: Sequence[Any]
    ) -> Case:
        asked = case.evidence.step, case.fault.kind, case.fault.place
        if self._gathered is not None:
            before, micro, clues = self._gathered
            if before == asked and any(one.batch is micro.batch for one in micros):  # asked again about the same update
                self.looked_at = micro
                return replace(case, clues=clues)
        case = self._gather_anew(case, micros, look, good, healthy)
        if look == "replay" and self.looked_at is not None:
            self._gathered = asked, self.looked_at, case.clues
        return case

    def _gather_anew(
        self, case: Case, micros: Sequence[MicroBatch], look: Look, good: Snapshot | None, healthy: Sequence[Any]
    ) -> Case:
        fault, evidence = case.fault, case.evidence
        module, data = self._learner.module, self._thresholds.data
        clues = [batch_clues(micro.batch, module, data, count=micro.drawn) for micro in micros]
        if any(one.bad_fields for one in clues):
            usual = non_finite_fields(healthy)
            clues = [replace(one, bad_fields=tuple(f for f in one.bad_fields if f.field not in usual)) for one in clues]
        chosen = next((index for index, one in enumerate(clues) if one.bad_fields), len(micros) - 1)
        if fault.scope == "batch":
            clues = compared(clues, healthy)
        case = replace(case, clues=clues[chosen])
        self.looked_at = micros[chosen]
        if look == "batch" or not self._replay_due(fault):
            return case
        usable = evidence.corrupt is None and not evidence.undo
        state: Untraced = nullcontext
        if not usable:  # under bad weights a replay would show only that
            if good is None:
                return case
            state = partial(state_of_snapshot, self._learner, good)
        if fault.scope == "batch" or number_format_exhausted(fault):
            known = bool(clues[chosen].bad_fields)
            for index in [chosen] if known else range(len(micros))[-self._thresholds.replay.max_micro_batches :]:
                with errors_logged(_failed(fault)), state():
                    replayed = self._replay(clues[index], micros[index])
                    if index == chosen or _not_finite(replayed):
                        case = replace(case, clues=replayed)
                    if _not_finite(replayed):
                        chosen = index
                        self.looked_at = micros[chosen]
                        case = replace(case, clues=self._look_closer(replayed, micros[index], good))
                        break
        # During the many updates of a trial any element may change a lot.
        recent = fault.scope != "learner" or fault.certain
        if good is not None and usable and recent and not case.clues.bad_fields:
            with errors_logged(_failed(fault)):
                case = replace(case, clues=self._compare_with_snapshot(case.clues, micros[chosen], good))
        if good is not None and self._learner_suspected(case):
            with errors_logged(_failed(fault)):
                case = self._add_curvature(case, micros[-1], good)
        return case

    def _replay_due(self, fault: Fault) -> bool:
        self._times_seen[fault.kind, fault.place] += 1
        times = self._times_seen[fault.kind, fault.place]
        return times <= self._thresholds.replay.always or times & (times - 1) == 0

    def _replay(self, clues: Clues, micro: MicroBatch) -> Clues:
        module, step = self._learner.module, partial(self._step, micro)
        scale = self._loss_scale()
        clues = replay(clues, micro.batch, module, partial(step, False), untraced=self._untraced, loss_scale=scale)
        if self._low_precision and _not_finite(clues) and not clues.bad_fields:
            with self._untraced():
                clues = replace(clues, finite_in_float32=runs_finite(module, partial(step, True)))
        elif _overflows_backward(clues) and any(p.dtype == torch.float16 for p in module.parameters()):
            with isolated(self._untraced):
                clues = replace(clues, gradient_fits=gradient_fits(module, partial(step, False)))
        return clues

    def _look_closer(self, clues: Clues, micro: MicroBatch, good: Snapshot | None) -> Clues:
        """Find out whether the fault depends on the random numbers of the step, or on buffers."""
        module = self._learner.module
        bad = tuple(name for name, buffer in module.named_buffers() if bad_unless_masked(buffer))
        if bad:
            before = {} if good is None else {name: good.leaves.get(("buffer", name)) for name in bad}
            spoilt = tuple(
                name for name, leaf in before.items() if isinstance(leaf, Tensor) and not bad_unless_masked(leaf)
            )
            return replace(clues, bad_buffers=bad, spoilt_buffers=spoilt)
        if clues.bad_fields or micro.streams is None:
            return clues
        for draw in range(self._thresholds.replay.other_draws):
            other = replace(micro, streams=micro.streams.elsewhere(draw))
            with isolated(self._untraced):
                if runs_finite(module, partial(self._step, other, False)):
                    return replace(clues, gone_otherwise=True)
        return replace(clues, gone_otherwise=False)

    def _compare_states(self, case: Case, good: Snapshot | None) -> Case:
        """Find out whether an implausible weight grew as a whole or in a few elements. No batch is run."""
        if good is None:
            return case
        change = self._change_since(good)
        alone = change is not None and change.name in (case.fault.place, case.evidence.jump)
        return replace(case, clues=replace(case.clues, change=change, moved_alone=alone))

    def _change_since(self, good: Snapshot) -> Change | None:
        change = unexplained_change(self._learner, good, self._thresholds.state)
        return None if change is None or change.updated else change

    def _compare_with_snapshot(self, clues: Clues, micro: MicroBatch, good: Snapshot) -> Clues:
        change = self._change_since(good)
        clues = replace(clues, change=change, moved_alone=change is not None)
        if change is None:
            return clues
        with self._untraced(), state_of_snapshot(self._learner, good):
            found = loss_and_gradient_norm(self._learner.module, partial(self._step, micro, False))
        if found is None:
            return clues
        return replace(clues, good_loss=found[0], good_finite=all(map(math.isfinite, found)))

    def _learner_suspected(self, case: Case) -> bool:
        if case.clues.bad_fields or case.clues.change is not None:
            return False
        limits = self._thresholds
        return worse_than_before(case.evidence, limits) or learner_diverged(case.fault, case.evidence, limits)

    def _add_curvature(self, case: Case, micro: MicroBatch, good: Snapshot) -> Case:
        if len(self._learner.optimizers) != 1:
            return case
        module, (optimizer,) = self._learner.module, self._learner.optimizers
        named = trained_parameters(module)
        with self._untraced(), state_of_snapshot(self._learner, good), uncompiled():
            # In full precision, because second derivatives are not usable in 16 bits.
            step = partial(self._step, micro, True)
            found = curvature_along_update(step, optimizer, named, self._thresholds.curvature)
        if found is None:
            return case
        curvature, layers = found
        return replace(case, curvature=curvature, model=Model(layers, updates=max(1, case.evidence.step)))


def _not_finite(clues: Clues) -> bool:
    return clues.origin is not None or clues.gradient_finite is False


def _overflows_backward(clues: Clues) -> bool:
    return clues.gradient_finite is False and clues.origin is not None and clues.origin.backward


def _failed(fault: Fault) -> str:
    return f"the cause of {fault.kind} could not be looked for"
