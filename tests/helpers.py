"""Small models, data, faults and comparisons for the acceptance tests: one copy of each.

A run is ``fit(task(...), batches(...), guard)``; what it left behind is ``state_of(run)``; two of those are compared
bit by bit with ``differences(one, other) == []``, which names what differs, or ``same_bits(one, other)``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, Metric

from lightning_nanguard import NaNGuard
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.batches import BatchesThresholds, RepeatedStepsThresholds

Batch = tuple[Tensor, Tensor]
OUTPUTS = 2


# ---------------------------------------------------------------------------------------------------- comparing


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested states differ; tensors bit by bit, so that NaN equals NaN and 0.0 is not -0.0."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if _same_tensor(one, other) else [f"{where}: {_told(one)} and {_told(other)}"]
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        same = one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        return [] if same else [where]
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Mapping):
        alone = [f"{where}/{key}: only in one" for key in {*one} ^ {*other}]
        return alone + [d for key in one if key in other for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(one, float):
        return [] if one.hex() == other.hex() else [f"{where}: {one!r} and {other!r}"]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def same_bits(one: Any, other: Any) -> bool:
    """Whether two nested states are equal bit by bit."""
    return not differences(one, other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    if one.is_sparse:
        one, other = one.coalesce(), other.coalesce()
        return _same_tensor(one.indices(), other.indices()) and _same_tensor(one.values(), other.values())
    left, right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(left, right)


def _told(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.detach().flatten()[:3].tolist()}"


def copied(state: Any) -> Any:
    """A deep copy that later updates in place do not reach."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


# ---------------------------------------------------------------------------------------------------- data


def batches(kind: str = "vectors", count: int = 12, size: int = 8, seed: int = 0) -> list[Batch]:
    """Regression data with something to learn; ``kind`` is the shape of an input."""
    source = torch.Generator().manual_seed(seed)
    shape = {"vectors": (6,), "images": (1, 6, 6), "sequences": (5, 4), "tokens": (5,)}[kind]
    hidden = torch.randn(math.prod(shape), OUTPUTS, generator=torch.Generator().manual_seed(77))
    made = []
    for _ in range(count):
        if kind == "tokens":
            x = torch.randint(0, 20, (size, *shape), generator=source)
            numbers = x / 10 - 1
        else:
            numbers = x = torch.randn(size, *shape, generator=source)
        y = numbers.flatten(1) @ hidden / 4 + 0.1 * torch.randn(size, OUTPUTS, generator=source)
        made.append((x, y))
    return made


def samples(data: Iterable[Batch]) -> list[Batch]:
    """The single samples of some batches, for a DataLoader that shuffles."""
    return [(x, y) for inputs, targets in data for x, y in zip(inputs, targets, strict=True)]


def with_nan(batch: Batch, row: int = 0) -> Batch:
    """The batch with one non-finite input sample."""
    x, y = batch[0].clone(), batch[1]
    x[row] = math.nan
    return x, y


def with_bad(*indices: int, count: int = 24) -> list[Batch]:
    """Vectors, some batches of which hold a non-finite input sample."""
    return [with_nan(batch) if index in indices else batch for index, batch in enumerate(batches(count=count))]


class Positioned(DataLoader[Any]):
    """A loader that a checkpoint can put back to where it was, so that a resumed run sees the data it would have."""

    def __init__(self, data: Sequence[Batch]) -> None:
        super().__init__(list(data), batch_size=None)
        self.at = 0

    def __iter__(self) -> Any:
        data = list(self.dataset)
        self.at %= len(data)
        for batch in data[self.at :]:
            self.at += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


# ---------------------------------------------------------------------------------------------------- models


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Attentive(nn.Module):
    """A small transformer with dropout and a causal mask, whose −inf is no poison."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, OUTPUTS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x), src_mask=self.mask)[:, -1])


class Looked(nn.Module):
    """An embedding, sparse gradients or not, and on request nothing but the embedding."""

    def __init__(self, sparse: bool = False, alone: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, OUTPUTS if alone else 6, sparse=sparse)
        self.head = nn.Identity() if alone else nn.Linear(6, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


def mlp(norm: bool = False) -> nn.Module:
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, OUTPUTS))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, OUTPUTS)
    )


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mlp": ("vectors", mlp),
    "norm": ("vectors", lambda: mlp(norm=True)),
    "cnn": ("images", cnn),
    "gru": ("sequences", Recurrent),
    "transformer": ("tokens", Attentive),
    "embedding": ("tokens", Looked),
    "sparse": ("tokens", lambda: Looked(sparse=True)),
    "sparse alone": ("tokens", lambda: Looked(sparse=True, alone=True)),
}


class Task(LightningModule):
    """Regression with any network; logs its loss at every step and as the epoch's mean, and a torchmetrics object.

    ``loss_factor`` is where :class:`FaultAt` puts a bad loss in.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        metric: Metric | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.metric = metric
        self.make_optimizer = optimizer or (lambda parameters: AdamW(parameters, lr=0.01))
        self.make_scheduler = scheduler
        self.loss_factor: float | None = None

    def loss(self, batch: Batch, name: str) -> Tensor:
        x, y = batch
        prediction = self.net(x)
        loss = (prediction - y).square().mean()
        if self.loss_factor is not None and self.training:
            loss = loss * self.loss_factor
        self.log(name, loss, on_step=self.training, on_epoch=True, batch_size=len(y), prog_bar=self.training)
        if self.metric is not None and self.training:
            self.metric(prediction.detach().float(), y.float())
            self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(batch, "loss")

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(batch, "val_loss")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.parameters()))
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        interval = "epoch" if plateau else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val_loss"},
        }


class TwoOptimizers(Task):
    """Manual optimization: a body and a head, each with an optimizer and a loss of its own, like a GAN's.

    ``leave_out`` holds pairs of optimizer and batch index whose step is not made: what a skip is compared with.
    """

    def __init__(self, optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None) -> None:
        super().__init__(mlp(), optimizer)
        self.automatic_optimization = False
        self.leave_out: set[tuple[int, int]] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.loss(batch, f"loss_{index}")
            self.manual_backward(loss)
            if (index, batch_idx) not in self.leave_out:
                optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        body, head = self.net[:-1], self.net[-1]
        return [self.make_optimizer(list(part.parameters())) for part in (body, head)]


def task(
    model: str = "mlp",
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    scheduler: Callable[[Optimizer], Any] | None = None,
    metric: bool = False,
    seed: int = 0,
) -> Task:
    """A task by the name of its model, the same at every call."""
    torch.manual_seed(seed)
    if model == "manual":
        return TwoOptimizers(optimizer)
    return Task(MODELS[model][1](), optimizer, scheduler, MeanSquaredError() if metric else None)


def data_for(model: str, count: int = 12, size: int = 8, seed: int = 0) -> list[Batch]:
    """Batches that fit the model of that name."""
    return batches("vectors" if model == "manual" else MODELS[model][0], count, size, seed)


# ---------------------------------------------------------------------------------------------------- optimizers


class Counting(SGD):
    """SGD whose rate falls with a count of steps that it keeps in its groups, with or without gradients."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    with torch.no_grad():
                        parameter.add_(parameter.grad, alpha=-group["lr"] / group["steps"] ** 0.5)
        return loss


class Lookahead(SGD):
    """Every third step the weights go half of the way back to slow ones, with or without gradients."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                for parameter in group["params"]:
                    state = self.state[parameter]
                    slow = state.setdefault("slow", parameter.detach().clone())
                    if group["calls"] % 3 == 0:
                        slow.lerp_(parameter, 0.5)
                        parameter.copy_(slow)
        return loss


# ---------------------------------------------------------------------------------------------------- runs


class MemoryLogger(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Run:
    """A fit that has ended."""

    trainer: Trainer
    module: Task
    logger: MemoryLogger
    random: dict[str, Any]


def fp16() -> MixedPrecision:
    """16-mixed with a GradScaler, on the CPU; its scale starts low enough for the first step to be made."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4))


def seed_all(seed: int = 1) -> None:
    """Every random stream starts anew."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Every random stream: torch's, NumPy's and Python's."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def trainer_for(
    folder: Path | str | None = None,
    guard: NaNGuard | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Trainer:
    """A quiet Trainer on the CPU; the guard comes last in the list, where a user may well put it."""
    if options.get("precision") == "16-mixed":
        del options["precision"]
        options["plugins"] = [fp16()]
    options.setdefault("max_epochs", 1)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    quiet["callbacks"] = [*callbacks, *([guard] if guard is not None else [])]
    quiet["default_root_dir"] = folder
    quiet["logger"] = MemoryLogger()
    return Trainer(**{**quiet, **options})


def fit(
    module: Task,
    data: Sequence[Batch] | DataLoader[Any],
    guard: NaNGuard | None = None,
    *,
    folder: Path | str | None = None,
    val: Sequence[Batch] = (),
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Train from seeded random streams; ``data`` are whole batches in their order, or a DataLoader."""
    trainer = trainer_for(folder, guard, callbacks, **options)
    loader = data if isinstance(data, DataLoader) else DataLoader(list(data), batch_size=None)
    # An empty list would make Lightning ask why there is a validation_step.
    val_loader = DataLoader(list(val) or list(data)[:1], batch_size=None)
    if not val:
        trainer.limit_val_batches = 0
    seed_all()
    trainer.fit(module, loader, val_loader)
    logger = trainer.logger if isinstance(trainer.logger, MemoryLogger) else MemoryLogger()
    return Run(trainer, module, logger, random_state())


def learner_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Weights, all buffers, torchmetrics objects and the optimizers' state; live tensors, not copies."""
    metrics = {name: m for name, m in module.named_modules() if isinstance(m, Metric)}
    return {
        "parameters": dict(module.named_parameters()),
        "buffers": dict(module.named_buffers()),
        "metrics": {
            name: {"states": {key: getattr(m, key) for key in m._defaults}, "count": m._update_count}
            for name, m in metrics.items()
        },
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
    }


def state_of(run: Run) -> dict[str, Any]:
    """Everything a run left behind that is not the guard's own."""
    scaler = getattr(run.trainer.precision_plugin, "scaler", None)
    return {
        **learner_of(run.trainer, run.module),
        "state_dict": run.module.state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in run.trainer.lr_scheduler_configs],
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": run.random,
        "callback_metrics": dict(run.trainer.callback_metrics),
        "logged_metrics": dict(run.trainer.logged_metrics),
        "progress_bar_metrics": dict(run.trainer.progress_bar_metrics),
        "logged": [row for row in run.logger.rows if not all(name.startswith("nanguard/") for name in row[1])],
        "clock": [run.trainer.global_step, run.trainer.current_epoch],
    }


def non_finite(state: Any, where: str = "") -> list[str]:
    """Names of the tensors in a nested state that hold NaN or Inf; masks of −inf by design are left out."""
    if isinstance(state, Tensor):
        return [] if where.endswith("mask") or bool(torch.isfinite(state).all()) else [where]
    if isinstance(state, Mapping):
        return [name for key, value in state.items() for name in non_finite(value, f"{where}/{key}")]
    if isinstance(state, (list, tuple)):
        return [name for i, value in enumerate(state) for name in non_finite(value, f"{where}/{i}")]
    return []


ONCE = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(updates_again=0)))
"""A rollback stays where it is: the updates since the snapshot are not made again."""


def words(guard: NaNGuard) -> list[tuple[str, ...]]:
    """The remedies of every intervention, in order."""
    return [intervention.remedies for intervention in guard.interventions]


def folder_of(guard: NaNGuard) -> Path:
    """Where the records of the guard's last run lie."""
    assert guard.run_dir is not None
    return guard.run_dir


class States(Callback):
    """Copies the learner after every update, by ``global_step``; listed callbacks come after the guard."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after[trainer.global_step] = copied(learner_of(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # A micro-batch that makes no update may already have touched the buffers.
        if trainer.global_step not in self.after:
            self.after[trainer.global_step] = copied(learner_of(trainer, pl_module))


# ---------------------------------------------------------------------------------------------------- faults


class FaultAt(Callback):
    """Puts ``value`` into one thing at the given training batches, counted over all epochs.

    Kinds: ``loss`` (every look at this batch gives it), ``flash`` (the loss, but only the first look), ``gradient``
    (one element, whenever this batch is differentiated), ``weight``, ``buffer``, ``moment`` (one element, between the
    batch before and this one), ``input`` and ``target`` (one sample, put back after the batch).

    Args:
        kind: What is hit.
        value: With what; a loss is multiplied by it.
        steps: At which batches.
        name: Name of the parameter or buffer; the first one that fits by default.
    """

    def __init__(self, kind: str, value: float, steps: int | Iterable[int], name: str | None = None) -> None:
        self.kind = kind
        self.value = value
        self.steps = {steps} if isinstance(steps, int) else set(steps)
        self.name = name
        self.batch = -1
        self.armed = False
        self.hits = 0
        self._undo: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._between(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.batch += 1
        self.armed = self.batch in self.steps
        if not self.armed:
            return
        if self.kind in ("loss", "flash"):
            pl_module.loss_factor = self.value
            self.hits += 1
        elif self.kind == "gradient":
            named = pl_module.named_parameters()
            hit = next(p for name, p in named if p.requires_grad and self.name in (None, name))
            self._undo = hit.register_hook(self._spoiled).remove
        elif self.kind in ("input", "target"):
            tensor = batch[0 if self.kind == "input" else 1]
            before = tensor.clone()
            tensor[1] = self.value
            self._undo = lambda: tensor.copy_(before)
            self.hits += 1

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if self.kind == "flash":
            pl_module.loss_factor = None

    def _spoiled(self, gradient: Tensor) -> Tensor:
        self.hits += 1
        gradient = gradient.clone()
        (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = self.value
        return gradient

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        pl_module.loss_factor = None
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._between(trainer, pl_module)

    def _between(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batch + 1 not in self.steps or self.kind not in ("weight", "buffer", "moment"):
            return
        target = self._target(trainer, pl_module)
        with torch.no_grad():
            target.view(-1)[0] = self.value
        self.hits += 1

    def _target(self, trainer: Trainer, module: LightningModule) -> Tensor:
        if self.kind == "buffer":
            return dict(module.named_buffers())[self.name or "net.1.running_var"]
        parameter = dict(module.named_parameters())[self.name or "net.0.weight"]
        if self.kind == "weight":
            return parameter
        return next(o.state[parameter]["exp_avg_sq"] for o in trainer.optimizers if parameter in o.state)


def with_last_rows(left: dict[str, Any]) -> dict[str, Any]:
    """What is left behind, with the last value that loggers were given of each name and step."""
    last = {(step, name): value for step, row in left["logged"] for name, value in row.items()}
    return {**left, "logged": {f"{name} {step}": value for (step, name), value in sorted(last.items())}}
