"""The smallest training loop there is, with a guard: one linear layer, one optimizer, no Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.plain import PlainHost
from lightning_nanguard import Budget, Detector, Fault, Remedy
from lightning_nanguard.diagnosis.case import Case, Look
from lightning_nanguard.diagnosis.rules import diagnose
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.types import Evidence, Finding


class Loop(PlainHost):
    """The smallest loop there is: one linear layer, one optimizer."""

    def __init__(
        self,
        *,
        lr: float = 0.1,
        detectors: tuple[Detector, ...] | None = None,
        remedies: tuple[Remedy, ...] | None = None,
        budget: Budget | None = None,
        settings: Settings | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.5, fused=fused)
        self.batch: Tensor | None = None
        self.guard = self.make_guard(
            self.net,
            self.optimizer,
            settings or Settings(snapshot_every=4),
            detectors=detectors,
            remedies=remedies,
            budget=budget,
        )

    def loss(self) -> Tensor:
        assert self.batch is not None
        return (self.net(self.batch) - self.batch.sum(1, keepdim=True)).square().mean()

    def run(
        self,
        batches: int,
        spoil: Callable[[int, Tensor], None] = lambda step, batch: None,
        without: int | None = None,
    ) -> None:
        draw = torch.Generator().manual_seed(1)
        if self.step == 0:
            self.guard.start()
        for number in range(batches):
            self.batch = torch.randn(8, 3, generator=draw)
            if number == without:
                continue
            spoil(self.step, self.batch)
            self.guard.open_batch()
            self.optimizer.zero_grad()
            loss = self.loss()
            self.guard.see_loss(loss)
            loss.backward()
            self.guard.before_step(0)
            self.optimizer.step()
            self.step += 1
            self.guard.close_batch()
        self.guard.flush()

    def batch_finite(self) -> bool | None:
        return None if self.batch is None else bool(torch.isfinite(self.batch).all())

    def probe(self) -> float | None:
        with torch.no_grad():
            return float(self.loss())

    def rehearsal_batches(self) -> int:
        return 1

    def loss_on(self, index: int) -> float | None:
        return self.probe()

    def train_on(self, index: int) -> float | None:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        return diagnose(Case(fault, evidence))

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.net.parameters())


def nan_at(*steps: int) -> Callable[[int, Tensor], None]:
    def spoil(step: int, batch: Tensor) -> None:
        if step in steps:
            batch[0, 0] = math.nan

    return spoil
