"""Runs whose steps fail once, or whenever a certain batch is run, and what they leave behind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanSquaredError

from lightning_nanguard import NaNGuard
from tests.helpers import OUTPUTS, Batch, Run, Task, batches, copied, fit, state_of

NAN = math.nan


class Fault:
    """Strikes in given steps; nothing puts it back, since it has no attributes beside its slots.

    Args:
        kind: What is struck.
        at: Numbers of the micro-batches, over all epochs.
        times: How often each of them is struck.
    """

    __slots__ = ("batch", "hits", "kind", "left")

    def __init__(self, kind: str, at: Sequence[int], times: int = 1) -> None:
        self.kind = kind
        self.left = dict.fromkeys(at, times)
        self.batch = -1
        self.hits = 0

    def strikes(self, kind: str) -> bool:
        if kind != self.kind or not self.left.get(self.batch):
            return False
        self.left[self.batch] -= 1
        self.hits += 1
        return True


class Faulty(Task):
    """A network with batch norm and dropout, which draws from every random stream, carries a state and counts."""

    def __init__(self, fault: Fault | None, optimizer: Callable[..., Optimizer] | None = None) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, OUTPUTS))
        super().__init__(net, optimizer, partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.97), None)
        self.metric = MeanSquaredError()
        self.fault = fault or Fault("none", ())
        self.carried: Tensor | None = None
        self.steps = 0
        self.seen: list[int] = []
        net[2].register_forward_hook(self.struck_activation)
        net[0].weight.register_hook(self.struck_gradient)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.fault.batch += 1

    def struck_activation(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output * NAN if self.training and self.fault.strikes("activation") else None

    def struck_gradient(self, gradient: Tensor) -> Tensor | None:
        if self.fault.strikes("backward raises"):
            raise ValueError("backward met NaN")
        return gradient * NAN if self.fault.strikes("gradient") else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.steps += 1
        self.seen.append(batch_idx)
        loss = self.loss(batch, "loss") * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        if self.carried is not None:
            loss = loss + 0.01 * (self.net[4].weight.sum() - self.carried.sum()).square()
        self.carried = self.net[4].weight.detach().clone()
        if self.fault.strikes("raises"):
            raise FloatingPointError("the loss is NaN")
        if self.fault.strikes("loss"):
            loss = loss * NAN
        return loss


class Sees(Callback):
    """Notes the hooks that a callback is called in, and the losses it is given."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.losses: list[Any] = []

    def on_before_zero_grad(self, *args: Any) -> None:
        self.calls.append("zero_grad")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.calls.append("backward")

    def on_after_backward(self, *args: Any) -> None:
        self.calls.append("after backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.calls.append("step")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.calls.append("end")
        self.losses.append(copied(outputs))


def left_behind(run: Run, sees: Sees, *, calls: bool = True) -> dict[str, Any]:
    """All that a run has left, but for what the guard adds."""
    state = state_of(run)
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        state[name] = {key: value for key, value in state[name].items() if "nanguard" not in key}
    state["logged"] = [row for row in state["logged"] if not any("nanguard" in key for key in row[1])]
    module = run.module
    assert isinstance(module, Faulty)
    own = {"carried": module.carried, "steps": module.steps, "seen": module.seen}
    progress = run.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict()
    seen = {"calls": sees.calls, "losses": sees.losses} if calls else {}
    return {**state, **own, "progress": progress, **seen}


def train(
    fault: Fault | None,
    folder: Path,
    *,
    guard: NaNGuard | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    data: Sequence[Batch] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Run]:
    """Train for two epochs; gives what is left behind, and the run."""
    sees = Sees()
    given = batches(count=12) if data is None else data
    options = {"max_epochs": 2, **options}
    run = fit(Faulty(fault, optimizer), given, guard, folder=folder, callbacks=[sees], **options)
    return left_behind(run, sees), run
