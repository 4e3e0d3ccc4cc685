"""What each rank runs of the tests in which all ranks make a step again together."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_nanguard import NaNGuard
from tests.distributed.data import AT, STEPS, without
from tests.helpers import Batch, batches, differences, learner_of
from tests.trainer.faulty_steps import Fault, Faulty

if TYPE_CHECKING:
    from tests.distributed.worker import Worker

LEFT_OUT = ((AT - 1,), (AT,), (AT - 1, AT))
"""Which micro-batches of a window are bad."""


def mine() -> int:
    """The rank of this process."""
    return int(os.environ["LOCAL_RANK"])


class Marked(Faulty):
    """A loss of NaN, or an exception, for batches with a marked sample, always.

    Args:
        way: What such a batch gives; ``"nothing"`` a loss of 0, whose gradient is 0.
        good: Share of good micro-batches in a window with bad ones, by which an expected gradient is divided.
    """

    def __init__(self, way: str, good: float = 1.0) -> None:
        super().__init__(None, partial(AdamW, lr=0.01))
        # Batch norm and dropout would make of a batch that was run what a batch that was not run is not.
        self.net = torch.nn.Sequential(self.net[0], self.net[2], self.net[4])
        self.way, self.good, self.bad = way, good, False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        marked = bool((batch[0] == 77.0).any())
        if marked and self.way == "raises":
            raise ValueError("Expected value argument to be within the support")
        loss = self.loss(batch, "loss")
        if marked:
            self.bad = True
            loss = sum(p.sum() for p in self.parameters()) * 0.0 if self.way == "nothing" else loss * torch.nan
        return loss

    def configure_optimizers(self) -> Optimizer:  # type: ignore[override]
        return AdamW(self.parameters(), lr=0.01)  # a schedule would go on where a batch is skipped

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Every rank has to know of the bad one's window; in these runs it is the one around AT.
        if self.way == "nothing" and self.fault.batch in (AT - 1, AT):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.good)


class Spoils(Marked):
    """Something of the user's makes numbers of one rank bad.

    Args:
        rank: The rank.
        what: ``"gradient"``, after every backward pass of some batches, or ``"weight"``, once before the first of them.
        bad: The batches.
        fault: A fault of the loss that is gone when the step is made again.
    """

    def __init__(self, rank: int, what: str, bad: tuple[int, ...], fault: Fault | None = None) -> None:
        super().__init__("loss")
        self.rank, self.what, self.spoilt, self.fault = rank, what, bad, fault or self.fault
        self.index = -1

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.index = batch_idx
        if self.what == "weight" and batch_idx == self.spoilt[0] and mine() == self.rank:
            with torch.no_grad():
                next(self.parameters())[0, 0] = torch.nan

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.fault.strikes("loss") else loss

    def on_after_backward(self) -> None:
        gradient = next(self.parameters()).grad
        if self.what == "gradient" and self.index in self.spoilt and mine() == self.rank and gradient is not None:
            gradient[0, 0] = torch.nan


class Communicates(Marked):
    """Its step calls a collective, as a loss over all ranks does."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        torch.distributed.all_reduce(torch.ones(1))
        return loss


class Always(Faulty):
    """A mistake of the user's on one rank, whatever the numbers are."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == AT and mine() == 1:
            raise ValueError("a mistake of the user's")
        return super().training_step(batch, batch_idx)


def marked(rank: int | None, *indices: int) -> Any:
    """The data of each rank, with a marked sample in batches of one of them."""

    def data(of: int) -> list[Batch]:
        made = batches(count=STEPS, seed=of)
        for index in indices if of == rank else ():
            made[index][0][1, 0] = 77.0
        return made

    return data


class Counts(Callback):
    """What a rank has seen of hooks."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_after_backward(self, *args: Any) -> None:
        self.calls.append("after backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.calls.append("step")


def left(trainer: Any, module: Faulty, counts: Counts) -> dict[str, Any]:
    """All that a fit has left."""
    metrics = {key: value for key, value in trainer.callback_metrics.items() if "nanguard" not in key}
    own = {"carried": module.carried, "steps": module.steps, "seen": module.seen}
    drawn = [torch.get_rng_state(), random.random(), float(np.random.rand())]
    return {**learner_of(trainer, module), "metrics": metrics, **own, "drawn": drawn, "calls": counts.calls}


def again(worker: Worker) -> None:
    """Transient faults, exceptions and bad micro-batches on each rank."""
    for accumulated in (1, 2):
        ends: dict[str, Any] = {}

        def fit(name: str, fault: Fault | None, ends: dict[str, Any] = ends, **options: Any) -> None:
            counts = Counts()
            random.seed(mine())
            np.random.seed(mine())
            made = worker.fit(name, Faulty(fault, partial(AdamW, lr=0.01)), counts, **options)
            ends[name] = left(*made, counts)

        options = {"accumulate_grad_batches": accumulated}
        fit(f"twin {accumulated}", None, guarded=False, **options)
        for rank in range(worker.world):
            for kind in ("loss", "activation", "raises"):
                for at in (AT,) if accumulated == 1 else (AT - 1, AT):
                    name = f"{kind} {accumulated} {rank} {at}"
                    fit(name, Fault(kind, (at,)) if mine() == rank else None, **options)
                    found = differences(ends[name], ends[f"twin {accumulated}"])
                    worker.results[name]["differences"] = found
    worker.fit("never", Marked("loss"), guarded=False, data=without(AT))
    for rank in range(worker.world):
        for way in ("loss", "raises"):
            worker.fit(f"{way} always {rank}", Marked(way), data=marked(rank, AT))
        for bad in LEFT_OUT:
            share = 1 - len(bad) / (2 * worker.world)
            options = {"accumulate_grad_batches": 2, "data": marked(rank, *bad)}
            worker.fit(f"expected {rank} {bad}", Marked("nothing", share), guarded=False, **options)
            for way in ("loss", "raises"):
                worker.fit(f"{way} {rank} {bad}", Marked(way), **options)
    for bad in LEFT_OUT[:2]:
        options = {"accumulate_grad_batches": 2}
        both: Any = lambda rank, bad=bad: marked(rank, *bad)(rank)  # noqa: E731
        worker.fit(f"expected together {bad}", Marked("nothing", 0.5), guarded=False, data=both, **options)
        worker.fit(f"together {bad}", Communicates("loss"), data=marked(1, *bad), **options)
    everywhere = {"accumulate_grad_batches": 2, "data": lambda rank: marked(rank, AT - 1, AT)(rank)}
    worker.fit("all of a window", Marked("loss"), **everywhere)
    worker.fit("never a window", Marked("loss"), guarded=False, **{**everywhere, "data": without(AT - 1, AT)})
    worker.fit("never soon", Marked("loss"), guarded=False, data=without(1))
    for rank in range(worker.world):
        worker.fit(f"raises soon {rank}", Marked("raises"), data=marked(rank, 1))
        window = {"accumulate_grad_batches": 2}
        worker.fit(f"spoils {rank}", Spoils(rank, "gradient", (AT,), Fault("loss", (AT,))))
        worker.fit(f"spoils a window {rank}", Spoils(rank, "gradient", (AT - 1, AT)), **window)
        worker.fit(f"weight in a window {rank}", Spoils(rank, "weight", (AT - 1,)), **window)
    worker.fit("late", Marked("loss"), data=marked(1, AT), guard=NaNGuard(readback="deferred"))


def mistaken(worker: Worker) -> None:
    """One rank raises for a reason of its own."""
    worker.fit("mistaken", Always(None))


def apart(worker: Worker) -> None:
    """One rank raises before it reaches a collective of the step, in which the other one waits."""
    worker.fit("apart", Communicates("raises"), data=marked(1, AT))
