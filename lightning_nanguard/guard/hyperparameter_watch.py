"""Replaces invalid learning rates and other hyperparameters before each update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.act.valid_hyperparameters import InvalidHyperparameter, words_for
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.recorder import InterventionRecorder
from lightning_nanguard.types import Fault, Finding, Reading


@final
@dataclass(eq=False)
class HyperparameterWatch:
    """Checks the learning rates, weight decay, momentum, betas and eps before each update.

    An invalid value is replaced by the last valid one. If there was none, the update is skipped. If a value is invalid
    on some ranks only, they use that of another rank from the next update on. If the update before was made with
    different values, all ranks go back to a snapshot.

    Args:
        context: Objects and settings that the parts of the guard share.
        skipper: Skips updates.
        recorder: Records the start of each stretch of invalid values; of many stretches the 1st, 2nd, 4th, 8th, ….
        schedulers: Name of the scheduler of each optimizer that has one, by the optimizer's index.
    """

    context: GuardContext
    skipper: StepSkipper
    recorder: InterventionRecorder
    schedulers: Mapping[int, str]
    _within: set[int] = field(default_factory=set, init=False)
    _stretches: int = field(default=0, init=False)
    # With several ranks: what the others are told before the next update, and whether their states differ.
    _untold: dict[str, Any] | None = field(default=None, init=False)
    _apart: bool = field(default=False, init=False)

    def look(self, optimizer_index: int) -> FoundFault | None:
        """Check the hyperparameters of the optimizer that steps next.

        Returns:
            With several ranks, a fault if they have made an update with different values; else ``None``.
        """
        valid = self.context.rate.valid
        optimizer = self.context.learner.optimizers[optimizer_index]
        apart = None
        if self.context.state.asks_hyperparameters:
            apart = self._agree(optimizer_index)
        else:
            valid.look(optimizer)
        if not valid.any() and not self._within:
            return apart
        invalid = valid.invalid(optimizer)
        if not invalid:
            self._within.discard(optimizer_index)
            return apart
        left_out = any(one.valid is None for one in invalid)
        if left_out and not self.context.settings.observe:
            self.skipper.skip(optimizer_index)
        if optimizer_index not in self._within:
            self._within.add(optimizer_index)
            self._stretches += 1
            if self._stretches & (self._stretches - 1) == 0:
                self._untold = self._described(optimizer_index, invalid, left_out=left_out)
        if self._untold is not None and not self.context.many:
            self._record(self._untold, ())
            self._untold = None
        return apart

    def refresh(self) -> None:
        """While a rank has an invalid value, give it the present ones, so that all ranks decide by the same rates."""
        if not self.context.state.asks_hyperparameters:
            return
        for optimizer in self.context.learner.optimizers:
            self.context.rate.valid.look(optimizer)
            present = self.context.rate.valid.present(optimizer)
            self.context.rate.valid.use(optimizer, self.context.ranks.gather(present))

    def _agree(self, optimizer_index: int) -> FoundFault | None:
        """Take the values of a rank that has valid ones. All ranks call this before the same update."""
        context, valid = self.context, self.context.rate.valid
        optimizer = context.learner.optimizers[optimizer_index]
        used, mine, self._untold = valid.used(optimizer), self._untold, None
        replaced = [[one.group, one.key] for one in valid.invalid(optimizer)]
        valid.look(optimizer)
        told = context.ranks.gather([used, valid.present(optimizer), replaced, mine, valid.any()])
        context.state.asks_hyperparameters = any(one[4] for one in told)
        valid.use(optimizer, [*(one[1] for one in told), *(one[0] for one in told)])
        ranks = tuple(rank for rank, one in enumerate(told) if one[3] is not None)
        if ranks:
            self._record(told[ranks[0]][3], ranks if len(ranks) < len(told) else ())
        wrong = {(group, key) for one in told for group, key in one[2]}
        self._apart |= any(one[0][group].get(key) != told[0][0][group].get(key) for group, key in wrong for one in told)
        if not self._apart or context.settings.observe or not context.ring.certified:
            return None
        self._apart = False
        message = "the ranks have made an update with different hyperparameters, because those of one were invalid"
        fault = Fault("parted_ranks", "state", "hyperparameters", None, message)
        reading = Reading(context.state.step, optimizer_index, None, None)
        return FoundFault(fault, reading, reached=True, late=True, ranks=ranks)

    def _described(
        self, optimizer_index: int, invalid: list[InvalidHyperparameter], *, left_out: bool
    ) -> dict[str, Any]:
        """The record of invalid values, in plain containers."""
        first = invalid[0]
        is_rate = first.key == "lr"
        what = "rate" if is_rate else "value"
        scheduler = self.schedulers.get(optimizer_index, "") if is_rate else ""
        message = "; ".join(words_for(invalid, scheduler))
        place = first.name
        if len(self.context.learner.optimizers) > 1:
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
        return {
            "fault": asdict(fault),
            "finding": asdict(finding),
            "word": "skip" if left_out else "hold rate" if is_rate else "hold value",
            "step": self.context.state.step,
        }

    def _record(self, described: Mapping[str, Any], ranks: tuple[int, ...]) -> None:
        recorder, step = self.recorder, described["step"]
        clock = recorder.clock(None if step == self.context.state.step else step)
        fault, word = Fault(**described["fault"]), described["word"]
        finding = Finding(**{**described["finding"], "samples": (), "rows": ()})
        recorder.record(fault, (word,), self.context.rate.effective(), finding, ranks, clock)
