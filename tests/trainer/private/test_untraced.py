"""Code of the user's that is run outside the run leaves no trace: one real fit, looked at from inside a hook."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer

from lightning_nanguard.trainer.private.training_step import BareStep, clip_as_configured
from lightning_nanguard.trainer.private.untraced import unlogged, untraced
from tests.helpers import Batch, Task, batches, copied, differences, fit, random_state, state_of, task


class Looks(Callback):
    """Runs a batch again in mid-epoch, in every way there is."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "inside.ckpt"
        self.losses: list[float | None] = []
        self.norms: list[float] = []
        self.dtypes: list[torch.dtype] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx != 5:
            return
        before = copied([dict(pl_module.named_buffers()), random_state(), dict(trainer.callback_metrics)])
        optimizer = trainer.optimizers[0]
        step = BareStep(trainer)
        with untraced(trainer, pl_module):
            self.losses.append(step.loss(batch, batch_idx))
            for full_precision in (False, True):
                loss = step.loss_with_graph(batch, batch_idx, full_precision=full_precision)
                assert loss is not None
                assert loss.requires_grad
                self.losses.append(float(loss.detach()))
                self.dtypes.append(pl_module.seen)
            self.losses.append(step.forward_backward(optimizer, batch, batch_idx))
            self.norms.append(self.norm(pl_module))
            clip_as_configured(trainer, optimizer)
            self.norms.append(self.norm(pl_module))
            torch.rand(1), np.random.rand(), random.random()
            pl_module.kept = "changed"
            trainer.save_checkpoint(self.file)
        optimizer.zero_grad(set_to_none=True)
        after = [dict(pl_module.named_buffers()), random_state(), dict(trainer.callback_metrics)]
        assert differences(before, after) == []
        assert pl_module.kept == "as it was"
        assert not self.file.exists()
        assert "forward_context" not in vars(trainer.precision_plugin)
        assert "save_checkpoint" not in {*vars(trainer), *vars(trainer.strategy)}

    def norm(self, module: Task) -> float:
        return float(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())


def seeing(seed: int = 0) -> Task:
    """A task with batch norm, a metric, an attribute, and a note of the dtype its layers compute in."""
    module: Any = task("norm", metric=True, seed=seed)
    module.kept, module.seen = "as it was", None
    module.net[-1].register_forward_hook(lambda layer, inputs, output: setattr(module, "seen", output.dtype))
    return module


def test_a_batch_run_again_leaves_no_trace(tmp_path: Path) -> None:
    """Random streams, buffers, metrics, running means, attributes and files are as if it had not been run, the run
    that goes on is the same, and each way of running it gives the loss of the weights of now."""
    data, options = batches(count=8), {"precision": "bf16-mixed", "gradient_clip_val": 0.01, "folder": tmp_path}
    looks = Looks(tmp_path)
    looked = fit(seeing(), data, callbacks=[looks], **options)
    bare = fit(seeing(), data, **options)
    assert differences(state_of(looked), state_of(bare)) == []
    assert looks.dtypes == [torch.bfloat16, torch.float32]
    first, again, exact, backward = looks.losses
    assert first is not None
    assert first == again == backward
    assert exact is not None
    assert 0 < abs(exact - first) < 0.05
    assert looks.norms[0] > 0.1
    assert 0 < looks.norms[1] < 0.011


class Writes(Callback):
    """Writes into what is not trained and replaces a buffer, in a run that ends in an error."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        before = copied(dict(pl_module.state_dict()))
        with pytest.raises(RuntimeError, match="size of tensor a"), untraced(trainer, pl_module):
            self._write(pl_module)
        assert differences(before, dict(pl_module.state_dict())) == []

    def _write(self, module: Any) -> None:
        module.average.mul_(3)
        module.net.register_buffer("mask", torch.zeros(2))
        module.average.add_(torch.ones(7))


def test_what_is_not_trained_comes_back(tmp_path: Path) -> None:
    """Averages and target networks, which a step may write into itself, and buffers that it replaces."""
    module = task("mlp")
    module.average = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    module.net.register_buffer("mask", torch.ones(2))
    fit(module, batches(count=1), callbacks=[Writes()], folder=tmp_path)


class LogsItself(Task):
    """Its own ``log`` does more than to log."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.last = value
        super().log(name, value, **options)


class Mutes(Callback):
    """Runs a batch again and notes whether that was logged."""

    def __init__(self) -> None:
        self.logged: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        means = [value.value.clone() for value in trainer._results.values()]
        with unlogged(pl_module):
            BareStep(trainer).loss(batch, batch_idx)
        now = [value.value for value in trainer._results.values()]
        self.logged.append(not all(map(torch.equal, means, now)))
        assert "log" not in vars(pl_module)


def test_what_runs_again_logs_nothing(tmp_path: Path) -> None:
    """``self.log`` does nothing in a module that has no ``log`` of its own."""
    for kind, logs in ((Task, False), (LogsItself, True)):
        mutes = Mutes()
        fit(kind(task("mlp").net), batches(count=3), callbacks=[mutes], folder=tmp_path)
        assert mutes.logged == [logs] * 3
