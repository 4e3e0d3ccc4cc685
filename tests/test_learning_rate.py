"""The multiplier on the learning rate, in real Lightning runs and alone.

``used`` below is what the arithmetic of an update was given: the ``lr`` argument of ``torch.optim.sgd.sgd``.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import BackboneFinetuning, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.trainer.private.learning_rate_monitor import around_learning_rate_monitors

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


class TestGuard(Callback):
    """Uses LearningRate as NaNGuard does; changes the multiplier inside the step that the plan names."""

    __test__ = False

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


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rate of every group in every SGD update from here on, in order."""
    rates: list[float] = []
    module = sys.modules["torch.optim.sgd"]  # torch.optim hides it
    original = module.sgd

    def recording(*args: Any, **kwargs: Any) -> None:
        rates.append(float(kwargs["lr"]))
        original(*args, **kwargs)

    monkeypatch.setattr(module, "sgd", recording)
    return rates


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


# Exactness


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch':RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "interval"), [("none", "step"), *((n, i) for n in SCHEDULERS if n != "none" for i in ("step", "epoch"))]
)
def test_scheduler(name: str, interval: str, used: list[float]) -> None:
    """Every update uses multiplier times the unguarded run's rate, and neither scheduler nor groups notice."""
    bare = train(Tiny(SCHEDULERS[name], interval))
    expected = scaled(taken(used), MULTIPLIERS)

    module, guard = Tiny(SCHEDULERS[name], interval), TestGuard(PLAN)
    guarded = train(module, guard)

    assert used == expected
    assert [rate for rates in guard.effective for rate in rates] == expected
    assert_same_clock(guarded, bare)
    reference = by_hand(Tiny(), expected, data() * EPOCHS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), reference, strict=True))


@pytest.mark.parametrize("name", ["exponential", "onecycle", "plateau"])
def test_change_between_steps(name: str, used: list[float]) -> None:
    """A multiplier set between two updates holds from the next one on."""
    bare = train(Tiny(SCHEDULERS[name]))
    expected = scaled(taken(used), MULTIPLIERS)
    guarded = train(Tiny(SCHEDULERS[name]), TestGuard(PLAN, "on_train_batch_start"))
    assert used == expected
    assert_same_clock(guarded, bare)


def test_clipping_accumulation_validation(used: list[float]) -> None:
    """Accumulation, gradient clipping and validation in between make no difference."""

    class Validated(Tiny):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        def val_dataloader(self) -> Batches:
            return Batches(data()[:1])

    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "val_check_interval": 2, "max_epochs": 4}
    bare = train(Validated(SCHEDULERS["exponential"]), **flags)
    expected = scaled(taken(used), MULTIPLIERS)
    guarded = train(Validated(SCHEDULERS["exponential"]), TestGuard(PLAN), **flags)
    assert used == expected
    assert_same_clock(guarded, bare)


def test_warm_up_in_optimizer_step(used: list[float]) -> None:
    """A rate that the module sets right before the step is a scheduled one, and is scaled once."""

    class WarmUp(Tiny):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group, rate in zip(optimizer.param_groups, GROUP_RATES, strict=True):
                group["lr"] = rate * min(1.0, (self.trainer.global_step + 1) / 8)
            optimizer.step(closure=optimizer_closure)

    bare = train(WarmUp(SCHEDULERS["exponential"]))
    expected = scaled(taken(used), MULTIPLIERS)
    guarded = train(WarmUp(SCHEDULERS["exponential"]), TestGuard(PLAN))
    assert used == expected
    assert_same_clock(guarded, bare)


def test_relative_edits(used: list[float]) -> None:
    """Code that multiplies the rate it finds is exact in every hook of the module, as is a scheduler stepped there."""

    class Edits(Tiny):
        def edit(self) -> None:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] *= 0.98

        def on_train_epoch_start(self) -> None:
            self.edit()

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.edit()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.edit()
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, *args: Any) -> None:
            self.edit()
            super().optimizer_step(*args)

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            self.edit()

        def on_train_batch_end(self, *_: Any) -> None:
            self.edit()

    bare = train(Edits(SCHEDULERS["exponential"], "epoch"))
    expected = scaled(taken(used), MULTIPLIERS)
    guarded = train(Edits(SCHEDULERS["exponential"], "epoch"), TestGuard(PLAN))
    assert used == expected
    assert_same_clock(guarded, bare)


class Overflowing(Tiny):
    """Gradients overflow in the updates of the given batches."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("constant", 1.0)
        loss = self.loss(batch).float()
        return loss * torch.finfo(torch.float32).max if batch_idx in (1, 3, 4) else loss


@pytest.mark.parametrize("name", ["none", "exponential", "onecycle", "chained", "plateau", "own", "duck"])
def test_overflow(name: str, used: list[float]) -> None:
    """An update that the GradScaler leaves out leaves no scaled rate behind for the scheduler to read."""

    def fp16() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))

    bare = train(Overflowing(SCHEDULERS[name]), plugins=[fp16()])
    stepped = [step for step in range(STEPS) if step % BATCHES not in (1, 3, 4)]
    expected = scaled(taken(used), [MULTIPLIERS[step] for step in stepped])
    assert len(expected) == 2 * len(stepped)

    guarded = train(Overflowing(SCHEDULERS[name]), TestGuard(PLAN), plugins=[fp16()])
    assert used == expected
    assert_same_clock(guarded, bare)


class Manual(Tiny):
    """Two optimizers of one group each, with a scheduler each; the second steps on every other batch."""

    def __init__(self, scheduler: Callable[[Optimizer], Any], first: bool, closure: bool) -> None:
        super().__init__(scheduler)
        self.automatic_optimization = False
        self.first, self.closure = first, closure

    def configure_optimizers(self) -> Any:
        optimizers = [SGD([group], lr=1.0) for group in self.groups()]
        return optimizers, [self.make_scheduler(optimizer) for optimizer in optimizers]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for index, (optimizer, scheduler) in enumerate(zip(self.optimizers(), self.lr_schedulers(), strict=True)):
            if self.first:
                scheduler.step()

            def closure(optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))

            if self.closure:
                optimizer.step(closure=closure)
            elif index == 0 or batch_idx % 2 == 0:
                closure()
                optimizer.step()
            if not self.first:
                scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning")
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("name", ["exponential", "lambda"])
def test_manual_optimization(name: str, closure: bool, first: bool, used: list[float]) -> None:
    """Several optimizers in manual optimization are exact wherever the user steps the schedulers."""
    bare = train(Manual(SCHEDULERS[name], first, closure))
    rates = taken(used)
    guarded = train(Manual(SCHEDULERS[name], first, closure), TestGuard(PLAN))
    assert used == scaled(rates, [multiplier_at(step) for step in range(len(rates))])
    assert_same_clock(guarded, bare)


def test_manual_overflow(used: list[float]) -> None:
    """In manual optimization a step that the GradScaler leaves out leaves the user's scheduler alone too."""

    class ManualOverflow(Manual):
        def loss(self, batch: Tensor) -> Tensor:
            loss = super().loss(batch).float()
            return loss * torch.finfo(torch.float32).max if self.trainer.global_step in (3, 6, 7) else loss

    def run(*callbacks: Callback) -> Trainer:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        return train(ManualOverflow(SCHEDULERS["exponential"], False, False), *callbacks, plugins=[plugin])

    bare = run()
    rates = taken(used)
    guarded = run(TestGuard(PLAN))
    attempts = [step for step in range(len(rates) + 3) if step not in (3, 6, 7)]
    assert used == scaled(rates, [multiplier_at(step) for step in attempts])
    assert_same_clock(guarded, bare)


def test_user_catches_what_the_closure_raises(used: list[float]) -> None:
    """A closure that raises, as on out of memory, leaves the scheduled rates in the groups."""

    class Catches(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            def fails() -> None:
                raise MemoryError

            optimizer = self.optimizers()[0]
            if batch_idx == 3:
                with pytest.raises(MemoryError):
                    optimizer.step(closure=fails)
                self.lr_schedulers()[0].step()
            super().training_step(batch, batch_idx)

    bare = train(Catches(SCHEDULERS["exponential"], False, True))
    taken(used)
    guarded = train(Catches(SCHEDULERS["exponential"], False, True), TestGuard({2: 0.5}))
    assert_same_clock(guarded, bare)


def test_lbfgs() -> None:
    """LBFGS, which reads its rate before the closure, uses the scaled one in every step after the change."""

    class Newton(Tiny):
        def __init__(self, rates: list[float] | None) -> None:
            super().__init__(SCHEDULERS["exponential"])
            self.rates = rates

        def make_optimizer(self) -> Optimizer:
            return LBFGS(self.parameters(), lr=1, max_iter=3)

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if self.rates is not None:
                self.trainer.optimizers[0].param_groups[0]["lr"] = self.rates[self.trainer.global_step]

    bare = Newton(None)
    bare_trainer = train(bare)
    reference = Newton([0.9**step * (0.5 if step >= 2 else 1.0) for step in range(STEPS)])
    train(reference)
    guarded = Newton(None)
    rate = HalfFromStep(2)
    guarded_trainer = train(guarded, rate)
    assert_same_clock(guarded_trainer, bare_trainer)
    for ours, theirs, unscaled in zip(guarded.parameters(), reference.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(ours, unscaled)


class HalfFromStep(TestGuard):
    """Halves the rate from a global step on, between two updates."""

    def __init__(self, step: int) -> None:
        super().__init__({})
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.rate.set_multiplier(0.5)


def test_group_added_in_mid_run(used: list[float]) -> None:
    """A group that is added while the multiplier is on is scaled from its first update on."""

    class Grows(Tiny):
        def groups(self) -> list[dict[str, Any]]:
            return super().groups()[:1] if self.trainer.current_epoch == 0 else super().groups()[1:]

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group(self.groups()[0])

    bare = train(Grows())
    rates = taken(used)
    guarded = train(Grows(), TestGuard({2: 0.5}))
    factors = [1.0] * 2 + [0.5] * (len(rates) - 2)
    assert len(rates) == BATCHES + 2 * BATCHES
    assert used == [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    assert_same_clock(guarded, bare)


class Backboned(Tiny):
    """A backbone that BackboneFinetuning unfreezes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        nn.init.eye_(self.backbone.weight)

    def make_optimizer(self) -> Optimizer:
        return SGD(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=0.1)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(self.backbone(batch))


def test_backbone_finetuning(tmp_path: Path, used: list[float]) -> None:
    """Lightning's BackboneFinetuning, which computes a rate from the one it finds, is exact beside a monitor."""

    def finetuning() -> BackboneFinetuning:
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False)

    bare = train(Backboned(), finetuning(), max_epochs=4)
    rates = taken(used)
    callbacks = (TestGuard({2: 0.5}), LearningRateMonitor(), finetuning())
    guarded = train(Backboned(), *callbacks, max_epochs=4, logger=CSVLogger(tmp_path))
    assert used == rates[:2] + [rate * 0.5 for rate in rates[2:]]
    assert_same_clock(guarded, bare)


# What others see


class MemoryLogger(CSVLogger):
    """Keeps what LearningRateMonitor logs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.seen: list[float] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.seen += [float(value) for key, value in metrics.items() if key.startswith("lr-")]


@pytest.mark.parametrize("order", ["guard first", "monitor first"])
@pytest.mark.parametrize("name", ["none", "exponential", "cosine"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("logging_interval", ["step", "epoch", None])
def test_learning_rate_monitor(name: str, interval: str, logging_interval: Any, order: str, tmp_path: Path) -> None:
    """LearningRateMonitor logs the effective rate, and its looking changes nothing."""
    bare_logger, logger = MemoryLogger(tmp_path), MemoryLogger(tmp_path)
    bare = train(Tiny(SCHEDULERS[name], interval), LearningRateMonitor(logging_interval), logger=bare_logger)

    guard, monitor = TestGuard({0: 0.5}), LearningRateMonitor(logging_interval)
    callbacks = [guard, monitor] if order == "guard first" else [monitor, guard]
    guarded = train(Tiny(SCHEDULERS[name], interval), *callbacks, logger=logger)

    # The guard acts inside the first step, after what is logged at the start of its epoch and of its batch.
    # Without an interval of its own, the monitor logs at the scheduler's, and at both where there is no scheduler.
    intervals = {logging_interval} if logging_interval else {interval} if name != "none" else {"step", "epoch"}
    before = len(GROUP_RATES) * len(intervals)
    assert logger.seen == bare_logger.seen[:before] + [rate * 0.5 for rate in bare_logger.seen[before:]]
    assert len(logger.seen) > before
    assert_same_clock(guarded, bare)
    assert not {"on_train_batch_start", "on_train_epoch_start"} & set(vars(monitor))


class Saver(Callback):
    """Keeps a copy of what a checkpoint would hold, at every hook of one step."""

    def __init__(self) -> None:
        self.rates: list[tuple[str, list[float]]] = []

    def keep(self, trainer: Trainer, hook: str) -> None:
        checkpoint = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        self.rates.append((hook, [group["lr"] for group in groups]))


def add_hooks() -> None:
    names = "on_train_epoch_start on_train_batch_start on_before_zero_grad on_before_backward on_after_backward"
    for name in f"{names} on_before_optimizer_step on_train_batch_end on_train_epoch_end".split():

        def hook(self: Saver, trainer: Trainer, *_: Any, name: str = name, **__: Any) -> None:
            self.keep(trainer, name)

        setattr(Saver, name, hook)


add_hooks()


def test_checkpoint_holds_scheduled_rates(used: list[float]) -> None:
    """A checkpoint written in any hook holds the scheduled rates."""
    bare_saver, saver = Saver(), Saver()
    train(Tiny(SCHEDULERS["exponential"]), bare_saver)
    train(Tiny(SCHEDULERS["exponential"]), TestGuard({0: 0.5}), saver)
    assert saver.rates == bare_saver.rates
    assert {name for name, _ in saver.rates} >= {"on_before_optimizer_step", "on_train_batch_end"}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("name", ["none", "exponential", "onecycle", "sequential", "plateau"])
def test_resume(name: str, tmp_path: Path, used: list[float]) -> None:
    """A run resumed from a checkpoint goes on with multiplier times the scheduled rate."""
    bare = train(Tiny(SCHEDULERS[name]))
    rates = taken(used)

    first = train(Tiny(SCHEDULERS[name]), TestGuard({2: 0.5}), max_epochs=1)
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert used == rates[:4] + [rate * 0.5 for rate in rates[4 : 2 * BATCHES]]
    taken(used)
    resumed = train(Tiny(SCHEDULERS[name]), TestGuard({}), ckpt_path=tmp_path / "last.ckpt")
    assert used == [rate * 0.5 for rate in rates[2 * BATCHES :]]
    assert_same_clock(resumed, bare)


@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step", "on_train_batch_end"])
def test_exception(hook: str, tmp_path: Path) -> None:
    """A run that dies leaves the scheduled rates, wherever it dies."""

    class Dies(Tiny):
        pass

    def die(self: Tiny, *_: Any, **__: Any) -> None:
        raise RuntimeError("dies here")

    setattr(Dies, hook, die)
    module, guard = Dies(), TestGuard({0: 0.5}, "on_train_batch_start")
    with pytest.raises(RuntimeError, match="dies here"):
        train(module, guard, LearningRateMonitor(), logger=CSVLogger(tmp_path))
    assert guard.rate.scheduled() == list(GROUP_RATES)
    assert [group["lr"] for group in guard.rate._optimizers[0].param_groups] == list(GROUP_RATES)


def test_untouched_at_one() -> None:
    """With a multiplier of 1.0 the groups keep the very objects they held, in every hook of the run."""
    seen: list[bool] = []

    class Watches(TestGuard):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            self.rate.apply()
            held = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append(all(ours is theirs for ours, theirs in zip(held, GROUP_RATES, strict=True)))

    train(Tiny(), Watches({}))
    assert seen == [True] * STEPS


# Without a Trainer


def one_group(lr: Any, **options: Any) -> tuple[Optimizer, LearningRate]:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = SGD([{"params": [parameter], "lr": lr}], lr=1.0, **options)
    return optimizer, LearningRate([optimizer])


def test_effective_is_never_counted_twice() -> None:
    """effective() and scheduled() say the same whether the rates are applied or not."""
    _, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    for change in (rate.apply, rate.apply, rate.withdraw, rate.withdraw, rate.apply):
        change()
        assert rate.effective() == [0.05]
        assert rate.scheduled() == [0.1]


def test_change_while_applied() -> None:
    """A multiplier that is set while scaled rates are written takes effect at once, and 1.0 puts back the object."""
    original = float("0.1")
    optimizer, rate = one_group(original)
    group = optimizer.param_groups[0]
    rate.set_multiplier(0.5)
    assert group["lr"] is original
    rate.apply()
    assert group["lr"] == 0.05
    rate.set_multiplier(0.3)
    assert group["lr"] == 0.1 * 0.3
    rate.set_multiplier(1.0)
    assert group["lr"] is original


def test_set_by_somebody_else() -> None:
    """A rate set while scaled ones are written is a new scheduled rate, even if it equals the scaled one."""
    optimizer, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    rate.apply()
    optimizer.param_groups[0]["lr"] = float("0.05")
    assert rate.scheduled() == [0.05]
    rate.apply()
    assert optimizer.param_groups[0]["lr"] == 0.025
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_set_by_somebody_else_is_kept() -> None:
    """What somebody sets while scaled rates are written is not overwritten when they are put back."""
    optimizer, rate = one_group(0.1)
    rate.set_multiplier(0.5)
    rate.apply()
    optimizer.param_groups[0]["lr"] = 0.2
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("positional", [False, True], ids=["keyword", "positional"])
def test_closure_sees_the_scheduled_rate(positional: bool, used: list[float]) -> None:
    """A closure sees the scheduled rate, may change the multiplier for its own update, and returns what it returned."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.set_multiplier(0.5)
    seen: list[float] = []

    def closure() -> str:
        seen.append(optimizer.param_groups[0]["lr"])
        rate.set_multiplier(0.25)
        return "loss"

    result = optimizer.step(closure) if positional else optimizer.step(closure=closure)
    assert (result, seen, used) == ("loss", [0.1], [0.025])
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("none", "plateau")])
def test_tensor_rates(name: str, used: list[float]) -> None:
    """Tensor rates are scaled in place: the group keeps its tensor, and the scheduler notices nothing."""

    def run(guarded: bool) -> tuple[list[float], Any, list[float]]:
        module = Tiny()
        rates = [torch.tensor(value) for value in GROUP_RATES]
        groups = [{**group, "lr": lr} for group, lr in zip(module.groups(), rates, strict=True)]
        optimizer = SGD(groups, lr=torch.tensor(1.0), foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        rate = LearningRate([optimizer])
        rate.attach()
        for step, batch in enumerate(data() * EPOCHS):
            if guarded and step in PLAN:
                rate.set_multiplier(PLAN[step])
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            scheduler.step()
        assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, rates, strict=True))
        return taken(used), plain(scheduler.state_dict()), [lr.item() for lr in rates]

    bare_used, bare_state, bare_rates = run(guarded=False)
    guarded_used, state, rates = run(guarded=True)
    expected = [
        (torch.tensor(value) * multiplier).item()
        for value, multiplier in zip(bare_used, [m for m in MULTIPLIERS for _ in range(2)], strict=True)
    ]
    assert guarded_used == expected
    assert (state, rates) == (bare_state, bare_rates)


def test_tensor_rate_shared_by_groups() -> None:
    """One tensor that is the rate of several groups is scaled once."""
    lr = torch.tensor(0.5)
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}]
    rate = LearningRate([SGD(groups, lr=lr, foreach=False)])
    rate.set_multiplier(0.5)
    rate.apply()
    assert lr.item() == 0.25
    assert (rate.effective(), rate.scheduled()) == ([0.25, 0.25], [0.5, 0.5])
    lr.fill_(0.25)  # by somebody else, who happens to choose the value we wrote
    assert rate.scheduled() == [0.25, 0.25]
    rate.withdraw()
    assert lr.item() == 0.25


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("scheduled", "effective"), [(1.0, 0.25), (0.25, 0.125), (0.125, 0.125), (0.0625, 0.0625), (0.0, 0.0)]
)
def test_min_lr(scheduled: float, effective: float, as_tensor: bool) -> None:
    """min_lr is a floor of the effective rate, and never lifts it above the scheduled one."""
    optimizer, rate = one_group(torch.tensor(scheduled) if as_tensor else scheduled, foreach=False)
    rate.set_multiplier(0.25, min_lr=0.125)
    assert rate.effective() == [effective]
    rate.apply()
    assert optimizer.param_groups[0]["lr"] == effective
    rate.withdraw()
    assert optimizer.param_groups[0]["lr"] == scheduled


def test_attach_and_detach(used: list[float]) -> None:
    """Attaching twice scales once; detaching takes the scale and the hooks away, and attaching again brings it back."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.attach()
    rate.set_multiplier(0.5)
    optimizer.step()
    rate.apply()
    rate.detach()
    rate.detach()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    rate.attach()
    optimizer.step()
    assert used == [0.05, 0.1, 0.05]


def test_state_dict_round_trip(tmp_path: Path) -> None:
    """The state is plain, survives torch.save with weights_only, and brings back multiplier and floor."""
    _, rate = one_group(0.1)
    rate.set_multiplier(0.25, min_lr=0.01)
    torch.save(rate.state_dict(), tmp_path / "state.pt")
    _, other = one_group(0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.multiplier, other.min_lr, other.effective()) == (0.25, 0.01, [0.025])


def test_group_without_a_rate() -> None:
    """A group whose rate is None, as in optimizers that compute their own, is left out."""
    optimizer, rate = one_group(0.1)
    optimizer.param_groups.append({"params": [], "lr": None})
    rate.set_multiplier(0.5)
    rate.apply()
    assert rate.effective() == [0.05]
    assert optimizer.param_groups[1]["lr"] is None


def test_no_scheduler_warning(used: list[float]) -> None:
    """torch's own check of the order of optimizer and scheduler steps keeps working with the hooks in place."""
    optimizer, rate = one_group(0.1)
    rate.attach()
    rate.set_multiplier(0.5)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    assert used == [0.05, 0.025]
    assert set(scheduler.state_dict()) == set(schedulers.ExponentialLR(one_group(0.1)[0], 0.5).state_dict())


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), True, "half", None])
def test_bad_multiplier(value: Any) -> None:
    """A multiplier that is not positive and finite is refused by name and value."""
    _, rate = one_group(0.1)
    with pytest.raises(ValueError, match=r"`value` to be a positive, finite multiplier but got"):
        rate.set_multiplier(value)
    assert rate.multiplier == 1.0


@pytest.mark.parametrize("min_lr", [-1e-9, float("nan"), float("inf"), "low"])
def test_bad_min_lr(min_lr: Any) -> None:
    """A floor that is negative or not finite is refused by name and value."""
    _, rate = one_group(0.1)
    with pytest.raises(ValueError, match=r"`min_lr` to be a finite number of at least 0 but got"):
        rate.set_multiplier(0.5, min_lr=min_lr)
    assert rate.multiplier == 1.0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"to have \['multiplier', 'min_lr'\] but got \[\]"),
        ({"multiplier": 0.5}, r"to have \['min_lr'\] but got \['multiplier'\]"),
        ({"multiplier": -1.0, "min_lr": 0.0}, r"`value` to be a positive"),
    ],
)
def test_bad_state(state: dict[str, Any], message: str) -> None:
    """A state that lacks an entry or holds a bad one is refused."""
    _, rate = one_group(0.1)
    with pytest.raises(ValueError, match=message):
        rate.load_state_dict(state)


def test_bad_optimizer() -> None:
    """Something that is no optimizer is refused when it is handed in."""
    with pytest.raises(TypeError, match="`optimizers` to hold torch optimizers but got 3"):
        LearningRate([3])  # type: ignore[list-item]


# The monitors


class Holder:
    """Stands for a trainer."""

    def __init__(self, *callbacks: Any) -> None:
        self.callbacks = list(callbacks)


def test_around_monitors_is_undone() -> None:
    """Only monitors (subclasses too) are surrounded, also when they raise, and the undo leaves nothing behind."""

    class Raises(LearningRateMonitor):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("no logger")

    calls: list[str] = []
    monitor, other = Raises(), Callback()
    undo = around_learning_rate_monitors(
        Holder(monitor, other), lambda: calls.append("before"), lambda: calls.append("after")
    )
    with pytest.raises(RuntimeError, match="no logger"):
        monitor.on_train_batch_start()
    assert calls == ["before", "after"]
    assert not vars(other)
    undo()
    undo()
    assert "on_train_batch_start" not in vars(monitor)
    assert "on_train_epoch_start" not in vars(monitor)


def test_around_monitors_wrapped_again() -> None:
    """What somebody else has wrapped since stays wrapped, and ours passes through."""
    calls: list[str] = []
    monitor = LearningRateMonitor()
    monitor.on_train_batch_start = lambda: calls.append("monitor")  # type: ignore[method-assign]
    own = monitor.on_train_batch_start
    undo = around_learning_rate_monitors(Holder(monitor), lambda: calls.append("before"), lambda: None)
    surrounded = monitor.on_train_batch_start
    monitor.on_train_batch_start = lambda: surrounded()  # type: ignore[method-assign]
    undo()
    monitor.on_train_batch_start()
    assert calls == ["monitor"]
    monitor.on_train_batch_start = own  # type: ignore[method-assign]
    undo = around_learning_rate_monitors(Holder(monitor), lambda: None, lambda: None)
    undo()
    assert monitor.on_train_batch_start is own


def test_imports_no_lightning() -> None:
    """learning_rate needs torch alone."""
    code = "import sys, lightning_nanguard.learning_rate; print([m for m in sys.modules if 'pytorch_lightning' in m])"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
