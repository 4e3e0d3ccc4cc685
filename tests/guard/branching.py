"""A plain loop that can train branches on the batch at hand, for the tests of what goes on beside the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nanguard.guard.branch import Branches
from lightning_nanguard.guard.control import Control
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.types import Fault
from tests.guard.plain_loop import EVIDENCE, PlainLoop

SUSPICION = Fault("stuck_loss", "learner", "loss", certain=False)
"""What a test begins a trial with."""


class BranchingLoop(PlainLoop):
    """Its loss is at most 10, so that a rate too high ruins it without a number that is not finite.

    Args:
        lr: Learning rate.
        options: What else :class:`PlainLoop` takes.
    """

    def __init__(self, lr: float, **options: object) -> None:
        super().__init__(lr=lr, **{"settings": EVIDENCE, **options})
        torch.manual_seed(0)
        self.net.reset_parameters()
        self.runs_again = True

    def loss(self) -> Tensor:
        return 10 * torch.tanh(super().loss() / 10)

    @contextmanager
    def showing(self, update: int) -> Iterator[bool]:
        yield update == self.step

    def trainable(self) -> bool:
        return True

    def train_at_hand(self) -> float | None:
        return self.train_on(0) if self.runs_again else None

    def loss_at_hand(self) -> float | None:
        return self.probe()


def branches(loop: PlainLoop) -> Branches:
    """What trains branches beside a loop."""
    return Branches(loop.guard.context, Rehearsal(loop.guard.context))


def trial_runner(loop: BranchingLoop) -> TrialRunner:
    """A trial runner of a loop, apart from that of its guard."""
    context, made = loop.guard.context, branches(loop)
    return TrialRunner(context, made, Control(context, made), loop)
