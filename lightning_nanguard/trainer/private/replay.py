"""Running ``training_step`` once more without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.trainer.private.precision import grad_scaler


def _loss(trainer: Any, batch: Any, batch_idx: int) -> Tensor | None:
    from pytorch_lightning.trainer import call

    output = call._call_strategy_hook(trainer, "training_step", batch, batch_idx)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def run_training_step(trainer: Any, batch: Any, batch_idx: int) -> float | None:
    """The loss of ``training_step``, in the trainer's precision, without backward; ``None`` where it gives none."""
    loss = _loss(trainer, batch, batch_idx)
    return None if loss is None else float(loss.detach())


def loss_with_graph(trainer: Any, batch: Any, batch_idx: int, *, full_precision: bool = False) -> Tensor | None:
    """The loss of ``training_step`` with its graph; ``None`` where it gives none.

    Args:
        trainer: The trainer.
        batch: A batch.
        batch_idx: Its index.
        full_precision: Leave autocast out.
    """
    with _without_autocast(trainer) if full_precision else nullcontext():
        return _loss(trainer, batch, batch_idx)


@contextmanager
def _without_autocast(trainer: Any) -> Iterator[None]:
    plugin = trainer.precision_plugin
    # On the instance: the plugin enters its own forward_context around training_step.
    plugin.forward_context = nullcontext
    try:
        yield
    finally:
        del plugin.forward_context


@contextmanager
def alone(trainer: Any, silence: Any) -> Iterator[None]:
    """Run the module itself, not what wraps it among ranks, and within ``silence``, which no collective leaves."""
    strategy = trainer.strategy
    wrapper = strategy.model
    strategy.model = strategy.lightning_module
    try:
        with silence:
            yield
    finally:
        strategy.model = wrapper


def forward_backward(trainer: Any, optimizer: Optimizer, batch: Any, batch_idx: int) -> float | None:
    """Gradients of a batch without the loops' hooks and counters; its loss, ``None`` where there is none.

    A GradScaler's scale is used but not updated.
    """
    loss = _loss(trainer, batch, batch_idx)
    if loss is None:
        return None
    value = float(loss.detach())
    scale = getattr(grad_scaler(trainer), "_scale", None)
    optimizer.zero_grad(set_to_none=True)
    (loss if scale is None else loss * scale).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter in parameters if scale is not None else ():
        parameter.grad.div_(scale)
    return value


def clip_as_configured(trainer: Any, optimizer: Optimizer) -> None:
    """The trainer's own clipping, applied to the gradients there are."""
    if not trainer.gradient_clip_val:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    clip_by_value = str(trainer.gradient_clip_algorithm or "norm") in ("value", "GradClipAlgorithmType.VALUE")
    own = torch.nn.utils.clip_grad_value_ if clip_by_value else torch.nn.utils.clip_grad_norm_
    own(parameters, trainer.gradient_clip_val)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Put every random stream back at the end: torch's on CPU and on the device, NumPy's and Python's."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def quiet(trainer: Any) -> Iterator[None]:
    """Keep ``self.log`` of the code inside out of the loggers' and the progress bar's sight, and saves off the disk:
    weights that are only tried out belong in no file."""
    with _without_saves(trainer), _without_logs(trainer):
        yield


@contextmanager
def _without_saves(trainer: Any) -> Iterator[None]:
    owners = (trainer, trainer.strategy)
    before = [vars(owner).get("save_checkpoint") for owner in owners]
    for owner in owners:
        owner.save_checkpoint = _save_nothing
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            if own is None:
                del owner.save_checkpoint
            else:
                owner.save_checkpoint = own


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _without_logs(trainer: Any) -> Iterator[None]:
    connector = getattr(trainer, "_logger_connector", None)
    if connector is None:
        yield
        return
    kept = {
        name: dict(value)
        for name in ("_logged_metrics", "_callback_metrics", "_progress_bar_metrics")
        if isinstance(value := getattr(connector, name, None), dict)
    }
    try:
        yield
    finally:
        for name, value in kept.items():
            live = getattr(connector, name)
            live.clear()
            live.update(value)
