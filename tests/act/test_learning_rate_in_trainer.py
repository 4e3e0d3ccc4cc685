"""The multiplier on the learning rate in real runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import BackboneFinetuning, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from tests.act.rates import (
    BATCHES,
    EPOCHS,
    GROUP_RATES,
    MULTIPLIERS,
    PLAN,
    SCHEDULERS,
    STEPS,
    Batches,
    RateGuard,
    Tiny,
    assert_same_clock,
    by_hand,
    data,
    multiplier_at,
    scaled,
    taken,
    train,
    without_guard,
)

# Exactness


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'. 'epoch':RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "interval"), [("none", "step"), *((n, i) for n in SCHEDULERS if n != "none" for i in ("step", "epoch"))]
)
def test_scheduler(name: str, interval: str, used: list[float]) -> None:
    """Every update uses multiplier times the unguarded run's rate, and neither scheduler nor groups notice."""
    rates, bare = without_guard(name, interval)
    expected = scaled(rates, MULTIPLIERS)
    taken(used)

    module, guard = Tiny(SCHEDULERS[name], interval), RateGuard(PLAN)
    guarded = train(module, guard)

    assert used == expected
    assert [rate for rates in guard.effective for rate in rates] == expected
    assert_same_clock(guarded, bare)
    reference = by_hand(Tiny(), expected, data() * EPOCHS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), reference, strict=True))


@pytest.mark.parametrize("name", ["exponential", "onecycle", "plateau"])
def test_change_between_steps(name: str, used: list[float]) -> None:
    """A multiplier set between two updates holds from the next one on."""
    rates, bare = without_guard(name)
    expected = scaled(rates, MULTIPLIERS)
    taken(used)
    guarded = train(Tiny(SCHEDULERS[name]), RateGuard(PLAN, "on_train_batch_start"))
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
    guarded = train(Validated(SCHEDULERS["exponential"]), RateGuard(PLAN), **flags)
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
    guarded = train(WarmUp(SCHEDULERS["exponential"]), RateGuard(PLAN))
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
    guarded = train(Edits(SCHEDULERS["exponential"], "epoch"), RateGuard(PLAN))
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

    guarded = train(Overflowing(SCHEDULERS[name]), RateGuard(PLAN), plugins=[fp16()])
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
    guarded = train(Manual(SCHEDULERS[name], first, closure), RateGuard(PLAN))
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
    guarded = run(RateGuard(PLAN))
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
    guarded = train(Catches(SCHEDULERS["exponential"], False, True), RateGuard({2: 0.5}))
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


class HalfFromStep(RateGuard):
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
    guarded = train(Grows(), RateGuard({2: 0.5}))
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
    callbacks = (RateGuard({2: 0.5}), LearningRateMonitor(), finetuning())
    guarded = train(Backboned(), *callbacks, max_epochs=4, logger=CSVLogger(tmp_path))
    assert used == rates[:2] + [rate * 0.5 for rate in rates[2:]]
    assert_same_clock(guarded, bare)


# What others see


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
    train(Tiny(SCHEDULERS["exponential"]), RateGuard({0: 0.5}), saver)
    assert saver.rates == bare_saver.rates
    assert {name for name, _ in saver.rates} >= {"on_before_optimizer_step", "on_train_batch_end"}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("name", ["none", "exponential", "onecycle", "sequential", "plateau"])
def test_resume(name: str, tmp_path: Path, used: list[float]) -> None:
    """A run resumed from a checkpoint goes on with multiplier times the scheduled rate."""
    rates, bare = without_guard(name)
    taken(used)
    first = train(Tiny(SCHEDULERS[name]), RateGuard({2: 0.5}), max_epochs=1)
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert used == rates[:4] + [rate * 0.5 for rate in rates[4 : 2 * BATCHES]]
    taken(used)
    resumed = train(Tiny(SCHEDULERS[name]), RateGuard({}), ckpt_path=tmp_path / "last.ckpt")
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
    module, guard = Dies(), RateGuard({0: 0.5}, "on_train_batch_start")
    with pytest.raises(RuntimeError, match="dies here"):
        train(module, guard, LearningRateMonitor(), logger=CSVLogger(tmp_path))
    assert guard.rate.scheduled() == list(GROUP_RATES)
    assert [group["lr"] for group in guard.rate._optimizers[0].param_groups] == list(GROUP_RATES)


def test_untouched_at_one() -> None:
    """With a multiplier of 1.0 the groups keep the very objects they held, in every hook of the run."""
    seen: list[bool] = []

    class Watches(RateGuard):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            self.rate.apply()
            held = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append(all(ours is theirs for ours, theirs in zip(held, GROUP_RATES, strict=True)))

    train(Tiny(), Watches({}))
    assert seen == [True] * STEPS
