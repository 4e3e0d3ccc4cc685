"""State that is bad again whenever an update is made again is the optimizer's doing, or the forward pass's. Updates are
not made again across a write of the user's code to a tensor that they do not change."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop

from lightning_nanguard import NaNGuard, TrainingDivergedError
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.trainer.repeat.repeated_cause import buffer_in_words, update_in_words, written_outside
from tests.helpers import Batch, FaultAt, Task, batches, fit, mlp, words

COUNT, RESTS, EMPTY = 40, 12, -100.0


class Normed(SGD):
    """Divides each gradient by its norm."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())
        return loss


OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "adamw": (
        partial(AdamW, betas=(0.9, 0.0), eps=1e-50),
        "AdamW (float32, eps 1e-50), parameter net.0.weight",
    ),
    "rmsprop": (partial(RMSprop, lr=0.001, alpha=0.0, eps=0.0), "RMSprop (float32, eps 0.0), parameter net.0.weight"),
    "normed": (partial(Normed, lr=0.01), "Normed (float32), parameter net.0.weight"),
}


class Rests(Task):
    """Its first layer is given zeros, and so gets a gradient of zeros, from some batch on."""

    def __init__(self, optimizer: Any) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), optimizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return (self.net(x * float(batch_idx < RESTS)) - y).square().mean()


class Usage(nn.Module):
    """Subtracts the mean of those rows of the batch before that count, of which there may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        counts, given = x[:, 0] > EMPTY, x - self.mean
        if self.training:
            self.mean.copy_(x[counts].detach().sum() / counts.sum())
        return given


def train(module: Task, data: Sequence[Batch], folder: Path) -> tuple[NaNGuard, str]:
    """Train; the guard, and the error that the run ended in."""
    guard = NaNGuard(snapshot_every_n_steps=5)
    try:
        fit(module, data, guard, folder=folder)
    except TrainingDivergedError as error:
        return guard, str(error)
    return guard, ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_that_the_optimizer_makes_bad(name: str, tmp_path: Path) -> None:
    """Optimizer, parameter and eps are named at the first fault; after two equal rollbacks the run ends with them,
    and the rate was never cut nor the device suspected."""
    make, place = OPTIMIZERS[name]
    guard, error = train(Rests(make), batches(count=COUNT), tmp_path)
    *back, last = guard.interventions
    assert [one.remedies for one in back] == [("restore",)] * 2
    assert last.remedies == ("stop",)
    for one in guard.interventions:
        assert one.finding is not None
        assert (one.cause, one.finding.place) == ("optimizer_update", place)
        assert "device" not in one.finding.suggestion
    assert "the fault came back after each of 2 rollbacks" in error
    assert place in error
    assert guard.lr_multiplier == 1.0


def test_buffers_that_the_forward_pass_makes_bad(tmp_path: Path) -> None:
    """The buffer, its module and the line that writes it are named, though the batch itself has a good loss; later
    such batches are skipped, however many there are, and the buffer keeps its value from before them."""
    torch.manual_seed(0)
    data = batches(count=COUNT)
    for index in (12, 17, 18, 22, 27, 33):
        data[index][0][:, 0] = 2 * EMPTY
    module = Task(nn.Sequential(Usage(), mlp()))
    guard, error = train(module, data, tmp_path)
    assert error == ""
    assert [one.remedies for one in guard.interventions] == [("restore",), *[("skip",)] * 5]
    assert [one.batch_idx for one in guard.interventions[1:]] == [17, 18, 22, 27, 33]
    lines, first = inspect.getsourcelines(Usage)
    line = first + next(index for index, text in enumerate(lines) if "copy_" in text)
    for one in guard.interventions:
        assert one.finding is not None
        assert one.cause == "forward_writes_buffer"
        assert one.finding.place == f"buffer net.0.mean of Usage (test_repeated_cause.py:{line})"
        assert "device" not in one.finding.suggestion
    assert all(bool(buffer.isfinite().all()) for buffer in module.buffers())


class Replaces(Task):
    """Replaces a buffer of its own by a new tensor, in a method beside ``training_step``."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp())
        self.register_buffer("size", torch.ones(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) / (1 + self.size)
        self.size = 0.9 * self.size + 0.1 * batch[1][batch[0][:, 0] > EMPTY].abs().mean()
        return loss


def test_a_buffer_that_is_replaced(tmp_path: Path) -> None:
    """No line is named rather than a wrong one, and later such batches are skipped."""
    data = batches(count=COUNT)
    for index in (12, 17, 18, 30):
        data[index][0][:, 0] = 2 * EMPTY
    guard, error = train(Replaces(), data, tmp_path)
    assert error == ""
    assert [one.remedies for one in guard.interventions] == [("restore",), *[("skip",)] * 3]
    places = {None if one.finding is None else one.finding.place for one in guard.interventions}
    assert places == {"buffer size of Replaces"}


def test_what_cannot_be_told_is_left_out() -> None:
    """A tensor that is no parameter has no dtype and no eps, and a buffer of the module itself is its step's."""
    task = Task(mlp())
    optimizer = SGD(task.parameters(), lr=0.1)
    assert update_in_words(task, optimizer, "parameter net.0.weight") == "SGD (float32), parameter net.0.weight"
    assert update_in_words(task, optimizer, "gone of another") == "SGD, gone of another"
    assert buffer_in_words(task, "buffer gate", lambda: None) == "buffer gate of Task"


class Targets(Task):
    """Trains towards a copy of its own net, which a hook renews now and then, as in deep Q-learning."""

    def __init__(self, every: int) -> None:
        super().__init__(mlp())
        self.every = every
        self.target = mlp().requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - wanted).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step % self.every == 0:
            self.target.load_state_dict(self.net.state_dict())


@pytest.mark.parametrize(("every", "done"), [(100, ("restore", "redo")), (9, ("restore",))])
def test_a_weight_that_is_lost_after_a_target_was_renewed(every: int, done: tuple[str, ...], tmp_path: Path) -> None:
    """If the target was renewed since the snapshot, the record says that updates are undone; else none is lost."""
    guard = NaNGuard(snapshot_every_n_steps=8)
    fit(Targets(every), batches(count=30), guard, folder=tmp_path, callbacks=[FaultAt("weight", math.nan, [20])])
    assert words(guard) == [done]
    assert (guard.interventions[0].updates_lost > 0) == ("redo" not in done)


def test_what_counts_as_written() -> None:
    """A tensor that changed in the run alone, in more than one element, to finite numbers."""
    net = nn.Linear(3, 2)
    learner = Learner(net, [torch.optim.SGD(net.parameters(), lr=0.1)])

    def state(weight: list[float], bias: float = 0.0) -> Snapshot:
        with torch.no_grad():
            net.weight.copy_(torch.tensor(weight).view(2, 3))
            net.bias.fill_(bias)
        return capture(learner, step=1, global_step=1)

    start, trained = [0.0] * 6, [1.0] * 6
    assert written_outside(state(start), state(trained), state(trained)) is None
    assert written_outside(state(start), state(trained), state(start)) == "parameter weight"
    assert written_outside(state(start), state([9.0, *start[1:]]), state(start)) is None
    assert written_outside(state(start), state([math.nan, *trained[1:]]), state(start)) is None
    assert written_outside(state(start), state(start, bias=2.0), state(start)) == "parameter bias"
