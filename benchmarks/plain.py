"""A guard in a loop without a Trainer, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_nanguard import Budget, Detector, Fault, Intervention, Remedy
from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.distributed.ranks import Ranks
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.guard.loop import BatchReplay
from lightning_nanguard.types import Evidence, Finding


class PlainHost(BatchReplay):
    """Counts steps and keeps records; a loop that can run batches again overrides what it can."""

    def __init__(self) -> None:
        self.step = 0
        self.records: list[Intervention] = []

    def make_guard(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        settings: Settings,
        *,
        detectors: Sequence[Detector] | None = None,
        remedies: Sequence[Remedy] | None = None,
        budget: Budget | None = None,
        ranks: Ranks | None = None,
    ) -> Guard:
        """A guard of one module and one optimizer in this loop; ``None`` stands for what ``NaNGuard()`` takes."""
        return guard_for(
            module, [optimizer], self, replay=self, settings=settings, detectors=detectors, remedies=remedies,
            budget=budget, ranks=ranks,
        )  # fmt: skip

    def clock(self) -> tuple[int, int, int]:
        return self.step, 0, self.step - 1

    def updates_left(self) -> float:
        return float("inf")

    def micro_batches(self) -> int:
        return 1

    def record(self, intervention: Intervention) -> None:
        self.records.append(intervention)

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        return None

    def comparable(self) -> bool:
        return True
