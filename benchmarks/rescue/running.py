"""Trains one case and says what state it ended in; knows nothing of who watches."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from io import StringIO
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from .data import Batch, loader
from .models import DONE, Task
from .optimizers import OWN

if TYPE_CHECKING:
    from .cases import Case

TIME_LIMIT = 300
"""Seconds after which a run is given up."""


class Learner(pl.LightningModule):
    """A net, its loss, an optimizer and a schedule, and whatever fault the case has.

    It gives each loss to ``note`` and tells ``called`` of each call of ``training_step``. What it held itself would be
    copied by whoever runs batches again, and put back afterwards.
    """

    def __init__(
        self,
        case: Case,
        task: Task,
        net: nn.Module,
        rate: float,
        note: Callable[[Tensor], None],
        called: Callable[[], object],
    ) -> None:
        super().__init__()
        self.case, self.task, self.net, self.base_rate = case, task, net, rate
        self.automatic_optimization = not task.adversarial
        self.dice = torch.Generator().manual_seed(case.seed + 77)
        self.seen = 0
        self.struck: set[int] = set()
        self.hook: Any = None
        self.quits_when_lost = False
        self.note, self.called = note, called

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.case.fault is not None:
            self.case.fault.on_batch(self, self.seen, self.dice)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.note(loss.detach().float().clone() if isinstance(loss, Tensor) else torch.tensor(math.nan))

        if self.quits_when_lost and self.seen % 16 == 0:
            lost = not all(bool(torch.isfinite(p).all()) for p in self.net.parameters())
            self.trainer.should_stop = self.trainer.should_stop or lost

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.called()
        if self.task.adversarial:
            return self._adversarial_step(batch)
        return self._report(self.task.loss(self.net, batch, self.seen), batch)

    def _report(self, loss: Tensor, batch: Batch) -> Tensor:
        if self.case.fault is not None:
            loss = self.case.fault.on_loss(self, self.seen, loss)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def _adversarial_step(self, batch: Batch) -> Tensor:
        generator, discriminator = self.net.generator, self.net.discriminator
        first, second = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch[0]), 4)
        soft = nn.functional.softplus
        real, made = discriminator(batch[0]), discriminator(generator(noise).detach())
        loss = self._report((soft(-real) + soft(made)).mean() + 0.05 * (real.square() + made.square()).mean(), batch)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        fooled = soft(-discriminator(generator(noise))).mean()
        second.zero_grad()
        self.manual_backward(fooled)
        second.step()
        return (loss + fooled).detach()

    def configure_optimizers(self) -> Any:
        if self.task.adversarial:
            parts = (self.net.discriminator, self.net.generator)
            made = [make_optimizer(self.case.optimizer, part.parameters(), self.base_rate) for part in parts]
            for group in (g for optimizer in made for g in optimizer.param_groups if "betas" in g):
                group["betas"] = (0.0, 0.99)  # as GANs want it: with momentum they circle
            return made
        trained = [p for p in self.net.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.case.optimizer, trained, self.base_rate)
        scheduler = make_schedule(self.case, optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_optimizer(name: str, parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """One of seven optimizers of PyTorch's at ``rate``, all else as it is by default, or one of :mod:`.optimizers`."""
    optim = torch.optim
    if name in OWN:
        return OWN[name](parameters, rate)
    match name:
        case "sgd":
            return optim.SGD(parameters, rate)
        case "momentum":
            return optim.SGD(parameters, rate, momentum=0.9)
        case "adam":
            return optim.Adam(parameters, rate)
        case "adamw":
            return optim.AdamW(parameters, rate)
        case "rmsprop":
            return optim.RMSprop(parameters, rate)
        case "adagrad":
            return optim.Adagrad(parameters, rate)
        case "lbfgs":
            return optim.LBFGS(parameters, rate, max_iter=4, history_size=5)
    raise ValueError(f"no optimizer is named {name!r}")


SHAPES = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "warmup": lambda t: min(1.0, 0.02 + t * 8),
    "step": lambda t: 0.3 ** int(t * 3),
    "onecycle": lambda t: max(0.04, t / 0.3 if t < 0.3 else 0.5 + 0.5 * math.cos(math.pi * (t - 0.3) / 0.7)),
    "warmup_cosine": lambda t: min(1.0, 0.02 + 10 * t) * (0.55 + 0.45 * math.cos(math.pi * t)),
    "restarts": lambda t: 0.5 + 0.5 * math.cos(math.pi * ((4 * t) % 1)),
    "exponential": lambda t: 0.1**t,
}
"""Schedules as functions of the share of the run that is over."""


def make_schedule(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    """The case's scheduler; one that a fault bends is a LambdaLR, every other is torch's own."""
    steps, rate, fault = case.steps, optimizer.param_groups[0]["lr"], case.fault
    bends = fault is not None and len({fault.rate(n, steps) for n in range(steps)}) > 1
    if bends:
        shape, multiplier = SHAPES[case.schedule], fault.rate  # type: ignore[union-attr]
        return schedulers.LambdaLR(optimizer, lambda n: shape(min(n / steps, 1)) * multiplier(n, steps))
    match case.schedule:
        case "constant":
            return None
        case "cosine":
            return schedulers.CosineAnnealingLR(optimizer, steps)
        case "warmup":
            return schedulers.LinearLR(optimizer, 0.02, total_iters=max(1, steps // 8))
        case "warmup_cosine":
            return schedulers.LambdaLR(optimizer, lambda n: SHAPES["warmup_cosine"](min(n / steps, 1)))
        case "step":
            return schedulers.StepLR(optimizer, max(1, steps // 3), 0.3)
        case "onecycle":
            cycle = "base_momentum" if optimizer.param_groups[0].get("momentum") else None
            return schedulers.OneCycleLR(optimizer, rate, steps + 1, cycle_momentum=cycle is not None)
        case "restarts":
            return schedulers.CosineAnnealingWarmRestarts(optimizer, max(1, steps // 4))
        case "exponential":
            return schedulers.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    raise ValueError(f"no schedule is named {case.schedule!r}")


@dataclass(slots=True)
class Trained:
    """What a fit left behind.

    Attributes:
        initial: Held-out loss of the untrained model.
        final: Held-out loss in the end.
        poisoned: Names of tensors that are not finite and were, or that did not exist.
        digest: Hash of weights, buffers, optimizer state, random state, logged values and losses.
        error: Class and message of the exception that ended fit, ``None`` where it came to its end.
        seconds: Wall time of fit.
        cpu_seconds: Processor time of fit.
        steps: Batches seen.
        losses: Training loss of each batch.
        changed: Whether any weight differs from the untrained model's.
        calls: How often ``training_step`` was called.
    """

    initial: float
    final: float
    poisoned: tuple[str, ...]
    digest: str
    error: tuple[str, str] | None
    seconds: float
    cpu_seconds: float
    steps: int
    losses: list[float] = field(default_factory=list)
    changed: bool = True
    calls: int = 0

    @property
    def ended_well(self) -> bool:
        """Whether fit came to its end with finite tensors and a finite held-out loss."""
        return self.error is None and not self.poisoned and math.isfinite(self.final)


def train(
    case: Case,
    callbacks: Sequence[pl.Callback] = (),
    clip_val: float | None = None,
    rate_factor: float = 1.0,
    quits_when_lost: bool = False,
) -> Trained:
    """Fit the case from its seed on and look at the end state.

    With ``quits_when_lost`` the run ends once its weights are not finite: nothing that never goes back can save it, and
    the suite saves the time.
    """
    task = case.recipe
    random.seed(case.seed)
    np.random.seed(case.seed % 2**32)
    torch.manual_seed(case.seed)
    split = task.data()
    net = task.net()
    dice = torch.Generator().manual_seed(case.seed + 5)
    batch_size = case.batch or task.batch
    rows, rate = split.train, case.rate * rate_factor
    if case.fault is not None:
        case.fault.on_build(net, dice)
        rows = case.fault.on_data(rows, dice, min(batch_size, len(rows[0])))
        if len({case.fault.rate(n, case.steps) for n in range(case.steps)}) == 1:
            rate *= case.fault.rate(0, case.steps)
    shuffle = task.shuffle if case.shuffle is None else case.shuffle
    rank = int(os.environ.get("LOCAL_RANK", 0))
    batches = loader(rows, batch_size, shuffle=shuffle, seed=case.seed, rank=rank, ranks=case.processes)
    trace: list[Tensor] = []
    calls = count()
    learner = Learner(case, task, net, rate, trace.append, lambda: next(calls))
    learner.quits_when_lost = quits_when_lost
    initial = held_out_loss(task, net)
    untrained = {name: t.detach().clone() for name, t in _tensors(learner, (), ())}
    averages = [pl.callbacks.EMAWeightAveraging(decay=0.95)] if case.average else []
    folder = tempfile.mkdtemp(prefix="rescue-")
    error: tuple[str, str] | None = None
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=case.processes,
            **_strategy(case.processes),
            max_steps=case.steps * (2 if task.adversarial else 1),
            max_epochs=-1,
            accumulate_grad_batches=case.accumulate,
            gradient_clip_val=case.clip_val if clip_val is None else clip_val,
            callbacks=[*averages, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
            **precision_options(case.precision),
        )
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            with deadline(TIME_LIMIT):
                trainer.fit(learner, batches)
        except Exception as e:
            error = (type(e).__name__, str(e))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shutil.rmtree(folder, ignore_errors=True)
    state = dict(_tensors(learner, trainer.optimizers, averages))
    poisoned = tuple(name for name, t in state.items() if _is_poisoned(t, _before(name, untrained)))
    random_state = repr((random.getstate(), np.random.get_state()[1].tobytes()))
    logged = float(trainer.callback_metrics.get("loss", math.nan))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = None if scaler is None else scaler.get_scale()
    losses = torch.stack(trace).tolist() if trace else []
    final = held_out_loss(task, net)
    digest = hashlib.sha256(repr((random_state, logged, scale, losses, final)).encode())
    for name, tensor in [*state.items(), ("rng", torch.get_rng_state())]:
        digest.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    changed = any(not torch.equal(state[name], t) for name, t in untrained.items() if name.startswith("weight"))
    return Trained(
        initial, final, poisoned, digest.hexdigest(), error, wall, cpu, learner.seen, losses, changed,
        next(calls),
    )  # fmt: skip


def held_out_loss(task: Task, net: nn.Module) -> float:
    """Loss on the held-out rows, in 32 bits and evaluation mode; draws no random number."""
    training = net.training
    net.eval()
    with torch.no_grad():
        loss = (task.held or task.loss)(net, task.data().held, DONE)
    net.train(training)
    return float(loss)


def _tensors(learner: Learner, optimizers: Iterable[Any], averages: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in learner.net.named_parameters():
        yield f"weight {name}", parameter.data
    for name, buffer in learner.net.named_buffers():
        yield f"buffer {name}", buffer
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            yield f"rate {i}.{j}", torch.tensor([float(group["lr"])], dtype=torch.float64)
            for k, parameter in enumerate(group["params"]):
                yield from _inside(f"moment {i}.{j}.{k}", optimizer.state.get(parameter, {}))
    for average in averages:
        for name, tensor in average._average_model.state_dict().items():
            yield f"average {name}", tensor


def _inside(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (int, float)):
        yield name, torch.tensor([float(value)], dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _inside(f"{name}.{i}", item)


def _before(name: str, untrained: Mapping[str, Tensor]) -> Tensor | None:
    """What a tensor was before fit; an average began as what it averages."""
    if name.startswith("average module.net."):
        name = name.removeprefix("average module.net.")
        return untrained.get(f"weight {name}", untrained.get(f"buffer {name}"))
    return untrained.get(name)


def _is_poisoned(tensor: Tensor, before: Tensor | None) -> bool:
    bad = ~torch.isfinite(tensor)
    if before is not None:
        bad &= torch.isfinite(before)
    return bool(bad.any())


def precision_options(name: str) -> dict[str, Any]:
    """Arguments of a Trainer for a precision by its short name."""
    if name == "fp16":  # precision="16-mixed" would silently become bf16 on CPU
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return {"precision": "bf16-mixed"} if name == "bf16" else {}


def _strategy(processes: int) -> dict[str, Any]:
    if processes == 1:
        return {}
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIME_LIMIT))
    return {"strategy": strategy, "use_distributed_sampler": False}  # Lightning's would shuffle rows that have an order


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """End what runs within with a TimeoutError after so many seconds."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"fit took more than {seconds} s")

    try:
        before = signal.signal(signal.SIGALRM, give_up)
    except ValueError:  # not in the main thread: no limit
        yield
        return
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
