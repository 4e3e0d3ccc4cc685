"""A small module with any scheduler, and a callback that uses the multiplier on the learning rate as NaNGuard does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.trainer.private.callbacks import around_learning_rate_monitors

BATCHES, EPOCHS = 6, 2
STEPS = BATCHES * EPOCHS
GROUP_RATES = (0.1, 0.03)
# The guard slows the run at step 2, slows it more at 5, gives half of it back at 7, all of it at 9.
PLAN = {2: 0.5, 5: 0.3, 7: 0.6, 9: 1.0}


def multiplier_at(step: int) -> float:
    return next((value for start, value in sorted(PLAN.items(), reverse=True) if start <= step), 1.0)


MULTIPLIERS = [multiplier_at(step) for step in range(STEPS)]


class Squares(schedulers.LRScheduler):
    """A user's own scheduler, recursive and with a memory of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.calls = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.calls += 1
        return [group["lr"] * (1 - 0.02 * self.calls) for group in self.optimizer.param_groups]


class Duck:
    """A user's own scheduler that is no LRScheduler and writes the groups by multiplying what they hold."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def sequential(optimizer: Optimizer) -> schedulers.SequentialLR:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer: Optimizer) -> schedulers.ChainedScheduler:
    parts = [schedulers.ConstantLR(optimizer, 0.5, total_iters=4), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts, optimizer)


SCHEDULERS: dict[str, Callable[[Optimizer], Any] | None] = {
    "none": None,
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.95**step),
    "step": lambda o: schedulers.StepLR(o, 2, 0.7),
    "multistep": lambda o: schedulers.MultiStepLR(o, [1, 4, 8], 0.7),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.93),
    "linear": lambda o: schedulers.LinearLR(o, 0.2, 1.0, total_iters=8),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=14, power=2.0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8, eta_min=0.001),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4, eta_min=0.001),
    "onecycle": lambda o: schedulers.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=STEPS + 1, cycle_momentum=False),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "sequential": sequential,
    "chained": chained,
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.7, patience=0, cooldown=1, min_lr=0.001),
    "own": Squares,
    "duck": Duck,
}


class Tiny(LightningModule):
    """Two groups, SGD with momentum, any scheduler; ``record`` keeps the rates every update was given."""

    def __init__(self, scheduler: Callable[[Optimizer], Any] | None = None, interval: str = "step") -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.make_scheduler = scheduler
        self.interval = interval
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
            self.layer.bias.fill_(0.1)

    def groups(self) -> list[dict[str, Any]]:
        weight, bias = GROUP_RATES
        return [{"params": [self.layer.weight], "lr": weight}, {"params": [self.layer.bias], "lr": bias}]

    def make_optimizer(self) -> Optimizer:
        return SGD(self.groups(), lr=1.0, momentum=0.5)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "constant"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Lightning asks for this override where a scheduler is no LRScheduler.
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(metric)
        else:
            scheduler.step()

    def loss(self, batch: Tensor) -> Tensor:
        return (self.layer(batch) - 1).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("constant", 1.0)
        return self.loss(batch)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 3, generator=generator) for _ in range(BATCHES)]


class Batches:
    """A data loader; Lightning takes a list for several."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class RateGuard(Callback):
    """Uses LearningRate as NaNGuard does; changes the multiplier inside the step that the plan names."""

    def __init__(self, plan: dict[int, float], where: str = "on_before_optimizer_step", min_lr: float = 0.0) -> None:
        self.plan, self.where, self.min_lr = plan, where, min_lr
        self.rate: LearningRate | None = None
        self.loaded: dict[str, Any] | None = None
        self.effective: list[list[float]] = []
        self.attempts = 0
        self.undo: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate = LearningRate(trainer.optimizers)
        if self.loaded is not None:
            self.rate.load_state_dict(self.loaded)
        self.rate.attach()
        self.undo = around_learning_rate_monitors(trainer, self.rate.apply, self.rate.withdraw)

    def change(self) -> None:
        if self.attempts in self.plan:
            self.rate.set_multiplier(self.plan[self.attempts], min_lr=self.min_lr)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.where == "on_train_batch_start":
            self.change()

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self.where == "on_before_optimizer_step":
            self.change()
        self.effective.append(self.rate.effective())
        self.attempts += 1

    def on_exception(self, *_: Any) -> None:
        if self.rate is not None:
            self.rate.withdraw()

    def teardown(self, *_: Any, **__: Any) -> None:
        self.undo()
        if self.rate is not None:
            self.rate.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"learning_rate": self.rate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["learning_rate"]


@contextmanager
def recorded_rates() -> Iterator[list[float]]:
    """The rate of every group in every SGD update inside, in order."""
    rates: list[float] = []
    module = sys.modules["torch.optim.sgd"]  # torch.optim hides it
    original = module.sgd

    def recording(*args: Any, **kwargs: Any) -> None:
        rates.append(float(kwargs["lr"]))
        original(*args, **kwargs)

    module.sgd = recording
    try:
        yield rates
    finally:
        module.sgd = original


def train(module: LightningModule, *callbacks: Callback, **flags: Any) -> Trainer:
    flags = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **flags}
    resume = flags.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **flags,
    )
    trainer.fit(module, Batches(data()), ckpt_path=resume)
    return trainer


@cache
def without_guard(name: str, interval: str = "step") -> tuple[list[float], Trainer]:
    """The rates that a run without a guard gives to its updates, and its trainer; trained once for all tests."""
    with recorded_rates() as rates:
        trainer = train(Tiny(SCHEDULERS[name], interval))
    return rates, trainer


def taken(rates: list[float]) -> list[float]:
    """What was recorded so far; recording starts anew."""
    result = list(rates)
    rates.clear()
    return result


def scaled(rates: list[float], multipliers: list[float]) -> list[float]:
    """Every update's rates times the multiplier of that update."""
    groups = len(rates) // len(multipliers)
    return [rate * multipliers[index // groups] for index, rate in enumerate(rates)]


def plain(state: Any) -> Any:
    """A scheduler's state without objects that compare by identity."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items() if key != "optimizer"}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    if hasattr(state, "state_dict"):
        return plain(state.state_dict())
    return state if isinstance(state, (int, float, str, Tensor, type(None))) else repr(type(state))


def assert_same_clock(guarded: Trainer, bare: Trainer) -> None:
    """Schedulers and the groups' rates are what they are without a guard."""
    for ours, theirs in zip(guarded.lr_scheduler_configs, bare.lr_scheduler_configs, strict=True):
        assert plain(ours.scheduler.state_dict()) == plain(theirs.scheduler.state_dict())
    for ours, theirs in zip(guarded.optimizers, bare.optimizers, strict=True):
        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]


def by_hand(module: Tiny, rates: list[float], batches: list[Tensor]) -> list[Tensor]:
    """Weights after plain torch has trained with the given rates."""
    optimizer = SGD(module.groups(), lr=1.0, momentum=0.5)
    for index, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates[2 * index :], strict=False):
            group["lr"] = rate
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]
