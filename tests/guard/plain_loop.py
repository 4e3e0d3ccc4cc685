"""A plain PyTorch loop with a guard: how a loop of your own uses one. The tests of the guard run through it.

:mod:`lightning_nanguard.guard.loop` describes what the loop tells the guard and what the guard asks of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nanguard import Fault, Intervention
from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.loop import BatchReplay, Clock
from lightning_nanguard.types import Evidence, Finding

Spoil = Callable[[int, Tensor], None]
EVIDENCE = Settings(snapshot_every=4, act_on="evidence")
"""For tests of finite suspicions that are acted on."""


class PlainLoop(BatchReplay):
    """Trains one linear layer with one optimizer, under a guard.

    Args:
        lr: Learning rate.
        fused: Whether the optimizer is fused, and so can skip a step on the device.
        net: What is trained.
        options: What else :func:`guard_for` takes.
    """

    def __init__(
        self, *, lr: float = 0.1, fused: bool = False, net: Callable[[], nn.Module] | None = None, **options: Any
    ) -> None:
        self.net = nn.Linear(3, 1) if net is None else net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.5, fused=fused)
        self.batch = torch.zeros(8, 3)
        self.step = 0
        self.records: list[Intervention] = []
        self.advice: list[Finding] = []
        options = {"replay": self, "settings": Settings(snapshot_every=4), **options}
        self.guard = guard_for(self.net, [self.optimizer], self, **options)

    def run(self, batches: int, spoil: Spoil = lambda step, batch: None, without: int | None = None) -> None:
        """Train on some batches; may be called again. ``finish`` and ``close`` are left to a loop that ends for good.

        Args:
            batches: How many.
            spoil: May change a batch before its step.
            without: Number of a batch to leave out.
        """
        draw = torch.Generator().manual_seed(1)
        if self.step == 0:
            self.guard.start()
        for number in range(batches):
            batch = torch.randn(8, 3, generator=draw)
            if number != without:
                spoil(self.step, batch)
                self.train(batch)
        self.guard.flush()

    def train(self, batch: Tensor) -> None:
        """One step: the calls of the guard stand where a loop has to make them."""
        self.batch = batch
        self.guard.open_batch()
        self.optimizer.zero_grad()
        loss = self.loss()
        self.guard.see_loss(loss)
        loss.backward()
        self.guard.before_step(0)
        self.optimizer.step()
        self.step += 1
        self.guard.close_batch()

    def loss(self) -> Tensor:
        return (self.net(self.batch) - self.batch.sum(1, keepdim=True)).square().mean()

    # What the guard asks of every loop.

    def clock(self) -> tuple[int, int, int]:
        return self.step, 0, self.step - 1

    def updates_left(self) -> float:
        return math.inf

    def micro_batches(self) -> int:
        return 1

    def record(self, intervention: Intervention) -> None:
        self.records.append(intervention)

    def advise(self, finding: Finding, clock: Clock | None = None) -> None:
        self.advice.append(finding)

    def diagnose(self, fault: Fault, evidence: Evidence, look: str, update: int) -> Finding | None:
        return RuleSet().diagnose(Case(fault, evidence))

    # What it asks of one that can run its batches again; BatchReplay has the rest.

    def comparable(self) -> bool:
        return True

    def batch_finite(self) -> bool | None:
        return bool(torch.isfinite(self.batch).all())

    def probe(self, *, redrawn: bool = False) -> float | None:
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


def nan_at(*steps: int) -> Spoil:
    """Spoils the batches of these steps: each holds a NaN."""

    def spoil(step: int, batch: Tensor) -> None:
        if step in steps:
            batch[0, 0] = math.nan

    return spoil


def remedies(loop: PlainLoop) -> list[tuple[str, ...]]:
    """What was done in each intervention, in order."""
    return [record.remedies for record in loop.records]


def is_finite(loop: PlainLoop) -> bool:
    """Whether every weight and buffer is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in loop.net.state_dict().values())


def state(loop: PlainLoop) -> dict[str, Any]:
    """Everything that training and the guard may change."""
    return {
        "weights": dict(loop.net.state_dict()),
        "optimizer": loop.optimizer.state_dict(),
        "gradients": {name: parameter.grad for name, parameter in loop.net.named_parameters()},
        "random": torch.get_rng_state(),
    }
