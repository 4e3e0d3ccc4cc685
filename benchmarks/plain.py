"""A guard in a loop without a Trainer, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.optim import Optimizer

from lightning_nanguard import Budget, Detector, Fault, Intervention, Remedy
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.diagnosis.case import Look
from lightning_nanguard.distributed.ranks import Ranks
from lightning_nanguard.guard.guard import Guard, Settings
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.types import Evidence, Finding


class PlainHost:
    """Counts steps, keeps records, and cannot run a batch again; a loop that can overrides what it can."""

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
        """A guard of one module and one optimizer, hosted here; ``None`` stands for what ``NaNGuard()`` takes."""
        remedies = default_remedies() if remedies is None else remedies
        return Guard(
            learner=Learner(module, [optimizer]),
            rate=LearningRate([optimizer]),
            make_scope=lambda: BatchUndo(module),
            host=self,
            detectors=default_detectors() if detectors is None else detectors,
            remedies=remedies,
            policy=Policy(remedies, budget or Budget()),
            ring=Ring(),
            settings=settings,
            ranks=ranks,
        )

    # What lightning_nanguard.engine.Host asks

    @property
    def stage(self) -> PlainHost:
        return self

    def clock(self) -> tuple[int, int, int]:
        return self.step, 0, self.step - 1

    def micro_batches(self) -> int:
        return 1

    def batch_finite(self) -> bool | None:
        return None

    def batch_strange(self) -> bool | None:
        return None

    def showing(self, update: int) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def comparable(self) -> bool:
        return True

    def gradient_finite(self) -> bool | None:
        return None

    def probe(self) -> float | None:
        return None

    def rehearsal_batches(self) -> int:
        return 0

    def rehearsing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def train_on(self, index: int) -> float | None:
        return None

    def loss_on(self, index: int) -> float | None:
        return None

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        return None

    def record(self, intervention: Intervention) -> None:
        self.records.append(intervention)
