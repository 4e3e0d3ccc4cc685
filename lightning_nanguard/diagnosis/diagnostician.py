"""Gathers clues as far as that is allowed, and asks the rules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from lightning_nanguard.diagnosis.batch import look_at
from lightning_nanguard.diagnosis.clues import Case, Clues, Look
from lightning_nanguard.diagnosis.replay import finite_again, replay
from lightning_nanguard.diagnosis.rules import diagnose
from lightning_nanguard.events import Fault, Finding
from lightning_nanguard.policy import Evidence

_logger = logging.getLogger("lightning_nanguard")

# Micro-batches of one update that are run again at most.
_MOST = 8
# How often a fault is replayed whatever it costs; then when it was seen 4, 8, 16 … times.
_ALWAYS = 3


@final
class Diagnostician:
    """Finds the cause of a fault. It never raises, and what it runs leaves no trace.

    Args:
        module: What is trained.
        step: Runs a batch forward: ``step(batch, offset, full_precision)`` gives the loss with its graph, ``None``
            where there is none; ``offset`` is 0 for the newest micro-batch, -1 for the one before.
        untraced: What is run within is undone.
        loss_scale: The GradScaler's scale, ``None`` without one.
        low_precision: Whether the run computes in 16 bits.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Any, int, bool], Tensor | None],
        untraced: Callable[[], AbstractContextManager[None]],
        *,
        loss_scale: Callable[[], float | None] = lambda: None,
        low_precision: bool = False,
    ) -> None:
        self._module = module
        self._step = step
        self._untraced = untraced
        self._loss_scale = loss_scale
        self._low_precision = low_precision
        self._seen: Counter[tuple[str, str]] = Counter()

    def diagnose(self, fault: Fault, evidence: Evidence, batches: Sequence[Any], look: Look) -> Finding | None:
        """The cause, ``None`` where none was found.

        Args:
            fault: What was found.
            evidence: What is known.
            batches: The micro-batches of the faulty update, the newest last.
            look: How much may be looked at.
        """
        try:
            return diagnose(Case(fault, evidence, self._gather(fault, batches, look)))
        except Exception as error:
            # Not to know why must never cost the run that the guard has just saved.
            _logger.debug("NaNGuard: the cause of %s could not be looked for: %r", fault.kind, error)
            return None

    def _gather(self, fault: Fault, batches: Sequence[Any], look: Look) -> Clues:
        if look == "nothing" or not batches:
            return Clues()
        looked = [look_at(batch, self._module) for batch in batches]
        chosen = next((index for index, clues in enumerate(looked) if clues.bad_fields), len(batches) - 1)
        if look == "batch" or not self._due(fault):
            return looked[chosen]
        known = bool(looked[chosen].bad_fields)
        for index in [chosen] if known else range(len(batches))[-_MOST:]:
            clues = self._replay(looked[index], batches[index], index + 1 - len(batches))
            if clues.origin is not None or clues.gradient_finite is False:
                return clues
            if index == chosen:
                last = clues
        return last

    def _due(self, fault: Fault) -> bool:
        if fault.scope != "batch" and fault.kind != "loss_scale_collapse":
            return False  # the evidence of a diverged learner lies in its weights and its history
        self._seen[fault.kind, fault.place] += 1
        count = self._seen[fault.kind, fault.place]
        return count <= _ALWAYS or count & (count - 1) == 0

    def _replay(self, clues: Clues, batch: Any, offset: int) -> Clues:
        try:
            with self._untraced():
                step = partial(self._step, batch, offset)
                clues = replay(clues, batch, self._module, partial(step, False), loss_scale=self._loss_scale())
            if self._low_precision:
                clues = replace(clues, low_precision=True)
                bad = clues.origin is not None or clues.gradient_finite is False
                if bad and not clues.bad_fields:
                    with self._untraced():
                        clues = replace(clues, finite_in_float32=finite_again(self._module, partial(step, True)))
        except Exception as error:
            _logger.debug("NaNGuard: the batch could not be run again to find the cause: %r", error)
        return clues
