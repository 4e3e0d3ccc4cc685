"""Gathers what can be known as far as that is allowed, and asks the rules."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import final

from torch import Tensor

from lightning_nanguard.diagnosis.batch import look_at
from lightning_nanguard.diagnosis.clues import Case, Clues, Look, Model
from lightning_nanguard.diagnosis.curvature import bend
from lightning_nanguard.diagnosis.replay import eager, kept, measured, replay
from lightning_nanguard.diagnosis.rules import diagnose
from lightning_nanguard.diagnosis.rules.words import learner_diverged, worse
from lightning_nanguard.diagnosis.state import out_of_place, standing_at
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Evidence, Fault, Finding

_logger = logging.getLogger("lightning_nanguard")

# Micro-batches of one update that are run again at most.
_MOST = 8
# How often a fault is looked into whatever it costs; then when it was seen 4, 8, 16 … times.
_ALWAYS = 3


@final
class Diagnostician:
    """Finds the cause of a fault. It never raises, and what it runs leaves no trace.

    Args:
        learner: What is trained.
        ring: Its snapshots.
        step: Runs a micro-batch forward with the random numbers it had: ``step(micro, full_precision)`` gives the loss
            with its graph, ``None`` where there is none.
        untraced: What is run within is undone.
        loss_scale: The GradScaler's scale, ``None`` without one.
        low_precision: Whether the run computes in 16 bits.
    """

    def __init__(
        self,
        learner: Learner,
        ring: Ring,
        step: Callable[[MicroBatch, bool], Tensor | None],
        untraced: Callable[[], AbstractContextManager[None]],
        *,
        loss_scale: Callable[[], float | None] = lambda: None,
        low_precision: bool = False,
    ) -> None:
        self._learner = learner
        self._ring = ring
        self._step = step
        self._untraced = untraced
        self._loss_scale = loss_scale
        self._low_precision = low_precision
        self._seen: Counter[tuple[str, str]] = Counter()

    def diagnose(
        self,
        fault: Fault,
        evidence: Evidence,
        micros: Sequence[MicroBatch],
        look: Look,
        good: Snapshot | None = None,
    ) -> Finding | None:
        """The cause, ``None`` where none was found.

        Args:
            fault: What was found.
            evidence: What is known.
            micros: The micro-batches of the faulty update, the newest last.
            look: How much may be looked at.
            good: The state to look at it from; chosen from the ring by default.
        """
        case = Case(fault, evidence)
        with _harmless(fault.kind):
            if look != "nothing" and micros:
                case = self._gather(case, micros, look, good)
            return diagnose(case)
        return None

    def _gather(self, case: Case, micros: Sequence[MicroBatch], look: Look, good: Snapshot | None) -> Case:
        fault, evidence = case.fault, case.evidence
        looked = [look_at(micro.batch, self._learner.module) for micro in micros]
        chosen = next((index for index, clues in enumerate(looked) if clues.bad_fields), len(micros) - 1)
        case = replace(case, clues=looked[chosen])
        if look == "batch" or not self._due(fault):
            return case
        good = self._ring.good(evidence.sound, evidence.loss_unit) if good is None else good
        # Of weights that are bad themselves a replay would only say so.
        usable = evidence.corrupt is None and not evidence.undo
        if fault.scope == "batch" or fault.kind == "loss_scale_collapse":
            known = bool(looked[chosen].bad_fields)
            for index in [chosen] if known else range(len(micros))[-_MOST:]:
                with _harmless(fault.kind), nullcontext() if usable else self._at(good):
                    clues = self._replay(looked[index], micros[index])
                    if index == chosen or _bad(clues):
                        case = replace(case, clues=clues)
                    if _bad(clues):
                        chosen = index
                        break
        if good is not None and usable and not case.clues.bad_fields:
            with _harmless(fault.kind):
                case = replace(case, clues=self._against(case.clues, micros[chosen], good))
        if good is not None and self._learner_suspected(case):
            with _harmless(fault.kind):
                case = self._around(case, micros[-1], good)
        return case

    def _due(self, fault: Fault) -> bool:
        self._seen[fault.kind, fault.place] += 1
        count = self._seen[fault.kind, fault.place]
        return count <= _ALWAYS or count & (count - 1) == 0

    @contextmanager
    def _at(self, good: Snapshot | None) -> Iterator[None]:
        if good is None:
            raise LookupError("there is no good state to run the batch again from")
        with standing_at(self._learner, good):
            yield

    def _replay(self, clues: Clues, micro: MicroBatch) -> Clues:
        module, step = self._learner.module, partial(self._step, micro)
        scale = self._loss_scale()
        clues = replay(clues, micro.batch, module, partial(step, False), untraced=self._untraced, loss_scale=scale)
        if self._low_precision:
            clues = replace(clues, low_precision=True)
            if _bad(clues) and not clues.bad_fields:
                with self._untraced():
                    seen = measured(module, partial(step, True))
                clues = replace(clues, finite_in_float32=None if seen is None else all(map(math.isfinite, seen)))
        return clues

    def _against(self, clues: Clues, micro: MicroBatch, good: Snapshot) -> Clues:
        change = out_of_place(self._learner, good)
        if change is None:
            return clues
        clues = replace(clues, change=change)
        with self._untraced(), self._at(good):
            seen = measured(self._learner.module, partial(self._step, micro, False))
        if seen is None:
            return clues
        return replace(clues, good_loss=seen[0], good_norm=seen[1], good_finite=all(map(math.isfinite, seen)))

    def _learner_suspected(self, case: Case) -> bool:
        if case.clues.bad_fields or case.clues.change is not None:
            return False
        return worse(case.evidence) or learner_diverged(case.fault, case.evidence)

    def _around(self, case: Case, micro: MicroBatch, good: Snapshot) -> Case:
        if len(self._learner.optimizers) != 1:
            return case
        module = self._learner.module
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with self._untraced(), self._at(good), kept(module), eager():
            # In full precision: second derivatives do not survive 16 bits.
            found = bend(partial(self._step, micro, True), self._learner.optimizers[0], named)
        if found is None:
            return case
        curvature, layers = found
        return replace(case, curvature=curvature, model=Model(layers, updates=max(1, case.evidence.step)))


def _bad(clues: Clues) -> bool:
    return clues.origin is not None or clues.gradient_finite is False


@contextmanager
def _harmless(kind: str) -> Iterator[None]:
    # Not to know why must never cost the run that the guard has just saved.
    try:
        yield
    except Exception as error:
        _logger.debug("NaNGuard: the cause of %s could not be looked for: %r", kind, error)
