"""Replaces invalid learning rates and other hyperparameters before each update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.act.valid_hyperparameters import InvalidHyperparameter, words_for
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.types import Fault, Finding


@final
class HyperparameterWatch:
    """Checks the learning rates, weight decay, momentum, betas and eps before each update.

    An invalid value is replaced by the last valid one. If there was none, the update is skipped.

    Args:
        context: Objects and settings that the parts of the guard share.
        skipper: Skips updates.
        recorder: Records the start of each stretch of invalid values; of many stretches the 1st, 2nd, 4th, 8th, ….
        schedulers: Name of the scheduler of each optimizer that has one, by the optimizer's index.
    """

    def __init__(
        self,
        context: GuardContext,
        skipper: StepSkipper,
        recorder: InterventionRecorder,
        schedulers: Mapping[int, str],
    ) -> None:
        self._context = context
        self._skipper = skipper
        self._recorder = recorder
        self._schedulers = dict(schedulers)
        self._within: set[int] = set()
        self._stretches = 0

    def look(self, optimizer_index: int) -> None:
        """Check the hyperparameters of the optimizer that steps next."""
        valid = self._context.rate.valid
        optimizer = self._context.learner.optimizers[optimizer_index]
        valid.look(optimizer)
        if not valid.any() and not self._within:
            return
        invalid = valid.invalid(optimizer)
        if not invalid:
            self._within.discard(optimizer_index)
            return
        left_out = any(one.valid is None for one in invalid)
        if left_out and not self._context.settings.observe:
            self._skipper.skip(optimizer_index)
        if optimizer_index not in self._within:
            self._within.add(optimizer_index)
            self._stretches += 1
            if self._stretches & (self._stretches - 1) == 0:
                self._record(optimizer_index, invalid, left_out=left_out)

    def _record(self, optimizer_index: int, invalid: list[InvalidHyperparameter], *, left_out: bool) -> None:
        first = invalid[0]
        is_rate = first.key == "lr"
        what = "rate" if is_rate else "value"
        scheduler = self._schedulers.get(optimizer_index, "") if is_rate else ""
        message = "; ".join(words_for(invalid, scheduler))
        place = first.name
        if len(self._context.learner.optimizers) > 1:
            place += f" of optimizer {optimizer_index}"
        cause = "invalid_learning_rate" if is_rate else "invalid_hyperparameter"
        fault = Fault(
            "invalid_learning_rate" if is_rate else "invalid_hyperparameter", "learner", place, first.number, message
        )
        finding = Finding(
            cause,
            confidence=1.0,
            evidence={what: first.number, "group": float(first.group), "scheduler": scheduler},
            place=f"{scheduler}, group {first.group}" if scheduler else place,
            suggestion=f"Correct {scheduler or f'the code that sets the {what}'}: {message}.",
        )
        word = "skip" if left_out else "hold rate" if is_rate else "hold value"
        clock = self._recorder.now(unmade=True)
        self._recorder.record(fault, (word,), self._context.rate.effective(), finding, clock=clock)
