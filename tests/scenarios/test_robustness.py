"""What must not end or change a healthy run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import NaNGuard
from tests.helpers import Run, Task, batches, fit, mlp, same_bits, state_of, with_bad


class Masked(nn.Module):
    """Builds a mask of −inf in the first forward, and another when asked for a longer one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls in (1, 20):
            self.register_buffer("mask", torch.full((self.calls,), -math.inf), persistent=False)
        return self.net(x)


class Odd(nn.Module):
    """An expanded buffer, one made in inference mode, a count that grows fast, a queue, a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("expanded", torch.zeros(1).expand(7))
        with torch.inference_mode():
            self.register_buffer("cached", torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(40_000))
        self.teacher = nn.Linear(6, 8)
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 32768
        self.queue[0] += 1
        with torch.no_grad():
            self.teacher.weight += 0.01
        return self.net(x)


def trained(net: Any, data: list[Any], guard: NaNGuard | None, folder: Path) -> Run:
    torch.manual_seed(0)
    return fit(Task(net()), data, guard, folder=folder)


@pytest.mark.parametrize("net", [Masked, Odd])
def test_odd_buffers_change_nothing(net: Any, tmp_path: Path) -> None:
    """Masks built late, expanded and inference tensors, fast counts: no intervention, and the same bits."""
    guard = NaNGuard(snapshot_every_n_steps=4)
    watched, bare = (trained(net, batches(count=40), one, tmp_path) for one in (guard, None))
    assert len(guard.interventions) == 0
    assert same_bits(state_of(watched), state_of(bare))


@pytest.mark.parametrize("net", [Masked, Odd])
def test_odd_buffers_do_not_keep_a_batch_from_being_skipped(net: Any, tmp_path: Path) -> None:
    """With them, a bad batch is skipped as ever."""
    data = with_bad(24, count=30)
    guard = NaNGuard(snapshot_every_n_steps=4)
    trained(net, data, guard, tmp_path)
    assert [record.remedies for record in guard.interventions] == [("skip",)]


def test_too_little_memory_for_snapshots_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a snapshot does not fit, they lie in host memory from then on, and the run goes on."""
    from lightning_nanguard.state import snapshot_placement

    real, calls = snapshot_placement.capture, []

    def capture(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("device"))
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(snapshot_placement, "capture", capture)
    guard = NaNGuard(snapshot_every_n_steps=4)
    trained(mlp, batches(count=30), guard, tmp_path)
    assert len(guard.interventions) == 0
    assert calls[2] is None
    assert {str(device) for device in calls[3:]} == {"cpu"}


def test_what_ends_a_run_is_what_the_user_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that fails while a run is ending hides nothing."""
    from lightning_nanguard.guard.guard import Guard

    def broken(self: Guard) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Guard, "flush", broken)

    class Broken(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise KeyError("the user's own mistake")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError, match="the user's own mistake"):
        fit(Broken(mlp()), batches(), NaNGuard(), folder=tmp_path)


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_save_holds_a_lost_weight(weights_only: bool, tmp_path: Path) -> None:
    """A weight lost just before a save is put back before anything is collected for the file."""
    from pytorch_lightning import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 20:
                with torch.no_grad():
                    next(module.parameters()).fill_(math.nan)
                trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)

    guard = NaNGuard(snapshot_every_n_steps=4)
    fit(Task(mlp()), batches(count=30), guard, folder=tmp_path, callbacks=[Save()])
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    assert [record.remedies for record in guard.interventions] == [("restore", "redo")]


def _quasi_newton(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.15, max_iter=1, history_size=5)


def _wandering(at: int = 30, count: int = 100) -> list[Any]:
    """Targets of a constant, one batch of which differs from the one before by nearly as much as the weight moved.

    By the change of the gradient LBFGS estimates the curvature, which is next to nothing there, and it goes far away.
    A few additions in double precision settle where, so that it is the same on every processor.
    """
    draw = torch.Generator().manual_seed(0)
    levels = 3 + 0.5 * torch.randn(count, 1, 1, generator=draw, dtype=torch.float64)
    spread = torch.randn(count, 8, 1, generator=draw, dtype=torch.float64)
    spread -= spread.mean(1, keepdim=True)
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = _quasi_newton([weight])
    before = weight.detach().clone()
    for level, noise in zip(levels[:at], spread, strict=False):
        before = weight.detach().clone()
        loss = (weight - level - noise).square().mean()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step(lambda loss=loss: loss)
    levels[at] = levels[at - 1] + (weight.detach() - before) * 0.9999
    return [(torch.ones(8, 1, dtype=torch.float64), level + noise) for level, noise in zip(levels, spread, strict=True)]


def test_a_run_that_wanders_is_left_alone(tmp_path: Path) -> None:
    """LBFGS whose loss goes two million times too high in one step, and comes back in forty, runs as without it."""
    guard, ended = NaNGuard(snapshot_every_n_steps=5), []
    for watching in (None, guard):
        net = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(net.weight)
        run = fit(Task(net, _quasi_newton), _wandering(), watching, folder=tmp_path, precision="64-true")
        ended.append(state_of(run))
    losses = [row["loss_step"] for _, row in run.logger.rows if "loss_step" in row]
    assert max(losses) > 1e6 * losses[0] > 1e6 * losses[-1]
    assert len([loss for loss in losses if loss > 10 * losses[0]]) > 25
    assert list(guard.interventions) == []
    assert same_bits(*ended)
