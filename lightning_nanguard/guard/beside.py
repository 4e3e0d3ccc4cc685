"""Trains other states beside a run: the arms of a trial, and the branch that an intervention gave up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lightning_nanguard.guard.branch import Branches
from lightning_nanguard.guard.control import Control
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.receipts import Receipts
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.types import Reading


@final
@dataclass(frozen=True, slots=True)
class Beside:
    """Trains the arms of a trial and the branch that an intervention gave up, to compare them with the run.

    Attributes:
        trials: Tests whether a lower rate learns what the run does not.
        receipts: Tests whether interventions in a run with finite numbers helped.
        branches: Trains the arms and the branch.
        control: Finds out whether branches make the updates of the run.
    """

    trials: TrialRunner
    receipts: Receipts
    branches: Branches
    control: Control

    def after(self, readings: Sequence[Reading]) -> FoundFault | None:
        """Continue trial and comparison after a healthy update.

        Args:
            readings: Healthy readings of the batch that has just ended.

        Returns:
            The suspicion whose trial has just ended; ``None`` if no trial has.
        """
        if not readings:
            return None
        self.receipts.after(readings)
        shown = self.trials.after(readings)
        if not (self.receipts.open or self.trials.running):
            self.branches.release()
            self.control.release()
        return shown

    def close(self) -> None:
        """End trial and comparison, because the run is over."""
        self.receipts.close("the run ended first")
        self.trials.cancel()
