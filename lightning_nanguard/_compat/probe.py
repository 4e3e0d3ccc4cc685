"""Running ``training_step`` once more without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def run_training_step(trainer: Any, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of ``training_step``, in the trainer's precision, without backward; ``None`` where it gives none."""
    from pytorch_lightning.trainer import call

    output = call._call_strategy_hook(trainer, "training_step", batch, batch_idx)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss.detach() if isinstance(loss, Tensor) else None


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Put every random stream back at the end: torch's on CPU and on the device, NumPy's and Python's."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)


@contextmanager
def quiet(trainer: Any) -> Iterator[None]:
    """Keep ``self.log`` of the code inside out of the loggers' and the progress bar's sight."""
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
