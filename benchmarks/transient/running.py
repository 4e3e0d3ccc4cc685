"""Runs a draw without a fault and without a guard, and with both, and compares what is left."""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_nanguard import NaNGuard
from lightning_nanguard.measure.readings import PendingReading

from .draws import (
    AVERAGES,
    BATCHES,
    EPOCHS,
    INPUTS,
    OPTIMIZERS,
    OUTPUTS,
    SCHEDULES,
    SIZE,
    VALUES,
    Draw,
    draw,
    network,
)

Readback = Literal["step", "deferred"]


class Struck(Protocol):
    """What a strike needs to know of a draw."""

    @property
    def seed(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def at(self) -> int: ...


class Strike:
    """Strikes once. It lies outside of the module, and knows of no guard.

    Args:
        one: The draw; ``None`` never strikes.
    """

    values: Mapping[str, Callable[[Tensor], Any]] = VALUES

    def __init__(self, one: Struck | None) -> None:
        self.one = one
        self.batch = -1
        self.hits = 0

    def due(self, kind: str) -> bool:
        """Whether it strikes now; it has struck then."""
        if self.one is None or self.hits or (kind, self.batch) != (self.one.kind, self.one.at):
            return False
        self.hits += 1
        return True

    def spoil(self, tensor: Tensor) -> Tensor:
        """Spoil one element of a tensor, in place."""
        assert self.one is not None
        with torch.no_grad():
            flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
            # A zero, such as a dead unit's gradient, would flip to a usual number, and one from two up to about zero.
            small = flat.abs().where(flat.abs() < 2, 0)
            index = int(small.argmax()) if self.one.value == "flip" else _index(self.one, flat.numel())
            self.values[self.one.value](flat[index : index + 1])
        return tensor


def _index(one: Struck, count: int) -> int:
    return random.Random(one.seed).randrange(count)


class StrikeState(pl.Callback):
    """Spoils the state between two batches.

    Args:
        strike: When, and how.
    """

    def __init__(self, strike: Strike) -> None:
        self.strike = strike

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        strike = self.strike
        strike.batch += 1
        dice = random.Random(0 if strike.one is None else strike.one.seed + 1)
        if strike.due("weight"):
            strike.spoil(dice.choice(list(module.parameters())).data)
        if strike.due("buffer"):
            strike.spoil(dice.choice([one for one in module.net.buffers() if one.is_floating_point()]))
        if strike.due("moment"):
            states = trainer.optimizers[0].state.values()
            moments = [one for state in states for one in state.values() if isinstance(one, Tensor) and one.dim()]
            strike.spoil(dice.choice(moments))


class Trained(pl.LightningModule):
    """A regression that draws from every random stream, and logs its loss and a metric.

    Args:
        one: The draw.
        strike: Spoils it.
    """

    def __init__(self, one: Draw, strike: Strike) -> None:
        super().__init__()
        torch.manual_seed(one.seed)
        self.one, self.net, self.metric = one, network(one), MeanSquaredError()
        self._strike = lambda: strike  # in a function, so that it is not taken for state of the module
        dice = random.Random(one.seed + 2)
        layers = list(self.net)
        dice.choice(layers).register_forward_hook(self._activation)
        dice.choice(list(self.parameters())).register_hook(self._gradient)

    def _activation(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        strike = self._strike()
        return output + strike.spoil(torch.zeros_like(output)) if strike.due("activation") else None

    def _gradient(self, gradient: Tensor) -> Tensor | None:
        strike = self._strike()
        return strike.spoil(gradient.clone()) if strike.due("gradient") else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        made = self.net(x + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        loss = (made - y).square().mean()
        strike = self._strike()
        if strike.due("loss"):
            loss = loss * strike.spoil(torch.ones(()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.metric(made.detach().float(), y)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return scheduled(OPTIMIZERS[self.one.optimizer](self.parameters()), self.one.schedule, self.one.steps)


def scheduled(optimizer: Any, schedule: str, steps: int) -> Any:
    """What ``configure_optimizers`` gives for an optimizer under a schedule.

    Args:
        optimizer: The optimizer.
        schedule: Name of the schedule.
        steps: Updates of the run.
    """
    known = SCHEDULES[schedule]
    if known is None:
        return optimizer
    interval, make = known
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer, steps), "interval": interval}}


class Rows(Logger):
    """Keeps what is logged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        mine = {name: value for name, value in metrics.items() if "nanguard" not in name}
        if mine:
            self.rows.append((step, mine))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    """How a draw went.

    Attributes:
        number: Its number.
        one: The draw.
        hits: How often it was struck.
        different: What is not bit for bit that of the run without the fault.
        records: What the guard did.
        error: What ended the run; empty where it reached its end.
    """

    number: int
    one: Draw
    hits: int
    different: tuple[str, ...]
    records: tuple[str, ...]
    error: str = ""


def outcome(job: tuple[int, int, Readback]) -> Outcome:
    """Run a draw.

    Args:
        job: The seed of the campaign, the draw's number, and when readings are read; deferred ones arrive as late as
            they may, as from a device that is far behind.
    """
    torch.set_num_threads(1)
    seed, number, readback = job
    one = draw(seed, number)
    strike, guard, error = Strike(one), NaNGuard(snapshot_every_n_steps=one.every, readback=readback), ""
    with quiet(), patch.object(PendingReading, "arrived", lambda reading: False):
        expected, left = _left_behind(one, Strike(None), None), {}
        try:
            left = _left_behind(one, strike, guard)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    names = sorted({*expected, *left})
    different = tuple(name for name in names if expected.get(name) != left.get(name))
    records = tuple(f"{one.fault} at {one.place}: {', '.join(one.remedies)}" for one in guard.interventions)
    return Outcome(number, one, strike.hits, different, records, error)


def _left_behind(one: Draw, strike: Strike, guard: NaNGuard | None) -> dict[str, bytes]:
    """All that a run leaves, but for what the guard adds; name and bits."""
    generator = torch.Generator().manual_seed(one.seed)
    x = torch.randn(BATCHES * SIZE, INPUTS, generator=generator)
    y = torch.tanh(x @ torch.randn(INPUTS, OUTPUTS, generator=generator))
    module, rows = Trained(one, strike), Rows()
    average = AVERAGES[one.average]
    averages = [] if average is None else [average()]
    with tempfile.TemporaryDirectory(prefix="transient-") as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=EPOCHS, precision=one.precision, logger=rows,
            accumulate_grad_batches=one.accumulate, gradient_clip_val=one.clip, log_every_n_steps=1,
            callbacks=[StrikeState(strike), *averages, *([] if guard is None else [guard])],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        torch.manual_seed(one.seed)
        np.random.seed(one.seed % (1 << 32))
        random.seed(one.seed)
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=SIZE, shuffle=True))
    return ending(trainer, module, rows, averages)


def ending(trainer: pl.Trainer, module: Any, rows: Rows, averages: list[Any]) -> dict[str, bytes]:
    """All that a run has left, but for what the guard adds; name and bits.

    Args:
        trainer: Its trainer.
        module: Its module.
        rows: Its logger.
        averages: Its callbacks that keep averages.
    """
    metrics = {name: value for name, value in trainer.callback_metrics.items() if "nanguard" not in name}
    return dict(
        bits(
            "",
            {
                "weights": dict(module.named_parameters()),
                "buffers": dict(module.named_buffers()),
                "optimizer": trainer.optimizers[0].state_dict(),
                "further optimizers": [one.state_dict() for one in trainer.optimizers[1:]],
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "averages": [one.state_dict() for one in averages],
                "average weights": [dict(one._average_model.named_parameters()) for one in averages],
                "metrics": metrics,
                "logged": {f"{step} {name}": value for step, row in rows.rows for name, value in row.items()},
                "rows": len(rows.rows),
                "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
                "progress": trainer.fit_loop.state_dict(),
                "clock": [trainer.global_step, trainer.current_epoch],
            },
        )
    )


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All that is in a nested value, with its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(f"{name}/{index}", item)
    else:
        yield name, value


def bits(name: str, value: Any) -> Iterator[tuple[str, bytes]]:
    """Name and bits of all that is in a nested value."""
    for leaf, item in leaves(name, value):
        if isinstance(item, Tensor):
            yield leaf, item.detach().contiguous().view(torch.uint8).numpy().tobytes() if item.dim() else _of_one(item)
        else:
            yield leaf, repr(item).encode() if not callable(item) else b""


def _of_one(value: Tensor) -> bytes:
    return value.detach().reshape(1).view(torch.uint8).numpy().tobytes()


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and without what Lightning and the guard say."""
    names = ("lightning_nanguard", "lightning.pytorch", "pytorch_lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
