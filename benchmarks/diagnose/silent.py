"""Runs with a mistake that makes no NaN, and runs in which what looks like one is meant: models are drawn.

By default they are drawn of layers that no rule was built on (:mod:`~benchmarks.diagnose.unseen`).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from benchmarks.rescue import data as sets
from benchmarks.rescue.cases import HEALTHY
from benchmarks.rescue.running import train
from lightning_nanguard import NaNGuard

from .problems import Dice
from .running import LOW, quiet
from .unseen import unseen

STEPS = 72
"""Updates of a run; the first 64 are looked at."""


# ----------------------------------------------------------------------------------------------------------- models


class Rows(nn.Module):
    """A recurrent net over the rows of an image; what it gives is the last output."""

    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.inner = kind(8, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 8, 8))[0][:, -1]  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embed(x.reshape(-1, 8, 8)) + self.place).mean(1)  # type: ignore[no-any-return]


class Drawn(Dice):
    """Chance that draws its models from those that rules were built on, or from others."""

    others = True


def features(dice: Dice, width: int, *, drops: bool = True) -> nn.Module:
    """A model from 64 pixels to features; with dropout where ``drops``."""
    if getattr(dice, "others", False):
        return unseen(dice, width, drops=drops)
    p = dice.uniform(0.1, 0.4) if drops else 0.0
    end: list[nn.Module] = [nn.Dropout(p)] if drops else []
    match dice.choice(["mlp", "norm", "cnn", "gru", "lstm", "attention"]):
        case "mlp":
            inner = dice.choice([32, 48])
            return nn.Sequential(nn.Linear(64, inner), dice.act(), *end, nn.Linear(inner, width), dice.act())
        case "norm":
            norm = dice.choice([nn.BatchNorm1d, nn.LayerNorm])(width)
            return nn.Sequential(nn.Linear(64, width, bias=dice.random() < 0.5), norm, nn.ReLU(), *end)
        case "cnn":
            return nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), *end,
                nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, width),
            )  # fmt: skip
        case "gru":
            return nn.Sequential(Rows(nn.GRU, width), *end)
        case "lstm":
            return nn.Sequential(Rows(nn.LSTM, width), *end)
    return Attention(width, p)


def initialised(dice: Dice, module: nn.Module) -> nn.Module:
    """The module as torch initialises it, or as people do by themselves."""
    how = dice.choice(["torch", "torch", "kaiming", "xavier", "normal"])
    for one in module.modules():
        if isinstance(one, (nn.Linear, nn.Conv2d)) and how != "torch":
            {
                "kaiming": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
                "xavier": nn.init.xavier_uniform_,
                "normal": lambda w: nn.init.normal_(w, std=0.02),
            }[how](one.weight)
            if one.bias is not None:
                nn.init.zeros_(one.bias)
    return module


class Classifier(pl.LightningModule):
    """Features in one or two parts and a head; ``join`` is what happens between them."""

    def __init__(self, dice: Dice, *, drops: bool | None = None) -> None:
        super().__init__()
        width = dice.choice([16, 32, 48])
        drops = dice.random() < 0.5 if drops is None else drops
        self.body = initialised(dice, features(dice, width, drops=drops))
        self.neck = initialised(dice, nn.Sequential(nn.Linear(width, width), dice.act()))
        self.head = initialised(dice, nn.Linear(width, 10))
        self.rate, self.name = dice.near(2e-3), dice.choice(["adam", "adamw", "sgd"])
        self.join: Callable[[Tensor], Tensor] = lambda h: h
        self.schedule: Callable[[Any], Any] | None = None
        self.interval = "step"
        self.finish: Callable[[Tensor], Tensor] = lambda loss: loss
        self.trained: Callable[[], Iterator[nn.Parameter]] = lambda: self.parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.join(self.body(x))))  # type: ignore[no-any-return]

    def loss_of(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.finish(self.loss_of(batch))

    def configure_optimizers(self) -> Any:
        made = self.make(self.trained())
        if self.schedule is None:
            return made
        return [made], [{"scheduler": self.schedule(made), "interval": self.interval}]

    def make(self, parameters: Any) -> optim.Optimizer:
        chosen = [p for p in parameters if p.requires_grad]
        if self.name == "sgd":
            return optim.SGD(chosen, 10 * self.rate, momentum=0.9)
        return (optim.Adam if self.name == "adam" else optim.AdamW)(chosen, self.rate)


class Manual(Classifier):
    """The same under manual optimization; ``clear`` and ``every`` say when gradients are zeroed and used."""

    def __init__(self, dice: Dice, clear: Callable[[Any], Any], every: int = 1) -> None:
        super().__init__(dice)
        self.automatic_optimization, self.clear, self.every = False, clear, every

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        if batch_idx % self.every == 0:
            self.clear(optimizer)
        loss = self.loss_of(batch)
        self.manual_backward(loss / self.every)
        if batch_idx % self.every == self.every - 1:
            optimizer.step()  # type: ignore[union-attr]
        return loss.detach()


@dataclass
class Run:
    """One run.

    Attributes:
        module: What is trained.
        loader: Its data; ``None`` for digits.
        options: Of the Trainer.
        callbacks: Of the Trainer.
    """

    module: pl.LightningModule
    loader: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)


Make = Callable[[Dice], Run]
"""Makes a run by chance."""


def digits(dice: Dice, batch: int | None = None, **options: Any) -> DataLoader[Any]:
    """Digits in shuffled batches."""
    x, y = sets.digits().train
    return DataLoader(TensorDataset(x, y), batch or dice.choice([16, 32]), shuffle=True, **options)


# --------------------------------------------------------------------------------------------------------- mistakes


def only_the_head(dice: Dice) -> Run:
    module = Classifier(dice)
    module.trained = lambda: module.head.parameters()
    return Run(module)


def without_the_neck(dice: Dice) -> Run:
    module = Classifier(dice)
    module.trained = lambda: iter([*module.body.parameters(), *module.head.parameters()])
    return Run(module)


def without_the_head(dice: Dice) -> Run:
    module = Classifier(dice)
    module.trained = lambda: iter([*module.body.parameters(), *module.neck.parameters()])
    return Run(module)


class WithoutGradients(nn.Module):
    """Runs a part with gradients switched off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)  # type: ignore[no-any-return]


def body_without_gradients(dice: Dice) -> Run:
    module = Classifier(dice)
    module.body = WithoutGradients(module.body)
    return Run(module)


def neck_without_gradients(dice: Dice) -> Run:
    module = Classifier(dice)
    module.neck, inner = WithoutGradients(module.neck), module.neck
    assert inner is not None
    return Run(module)


class Disabled(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            h = self.body(x)
        return self.head(self.neck(h))  # type: ignore[no-any-return]


def gradients_disabled(dice: Dice) -> Run:
    return Run(Disabled(dice))


def frozen_body(dice: Dice) -> Run:
    module = Classifier(dice)
    module.body.requires_grad_(False)
    return Run(module)


def frozen_neck(dice: Dice) -> Run:
    module = Classifier(dice)
    module.neck.requires_grad_(False)
    return Run(module)


def all_but_the_head_frozen(dice: Dice) -> Run:
    module = Classifier(dice)
    module.body.requires_grad_(False)
    module.neck.requires_grad_(False)
    return Run(module)


def detached(dice: Dice) -> Run:
    module = Classifier(dice)
    module.join = lambda h: h.detach()
    return Run(module)


def by_its_data(dice: Dice) -> Run:
    module = Classifier(dice)
    module.join = lambda h: functional.normalize(h.data, dim=1) * 4
    return Run(module)


def through_numpy(dice: Dice) -> Run:
    module = Classifier(dice)
    module.join = lambda h: torch.from_numpy(h.detach().cpu().numpy().copy())
    return Run(module)


def never_cleared(dice: Dice) -> Run:
    return Run(Manual(dice, lambda optimizer: None))


class Uncleared(Classifier):
    def optimizer_zero_grad(self, *arguments: Any) -> None:
        pass


def clearing_overridden(dice: Dice) -> Run:
    return Run(Uncleared(dice))


def another_is_cleared(dice: Dice) -> Run:
    """The gradients of an optimizer made by hand are zeroed, and it has other parameters."""
    module = Manual(dice, lambda optimizer: other.zero_grad())
    other = optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    return Run(module)


class Evaluating(Classifier):
    part: Callable[[Any], nn.Module] = lambda self: self
    once = False

    def on_train_epoch_start(self) -> None:
        self.part(self).eval()


def evaluating(dice: Dice) -> Run:
    module = Evaluating(dice, drops=True)
    module.part = lambda self: self
    return Run(module)


def body_evaluating(dice: Dice) -> Run:
    module = Evaluating(dice, drops=True)
    module.part = lambda self: self.body
    return Run(module)


class Sampling(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 8 == 0:
            self.eval()
            with torch.no_grad():
                self(batch[0])


def left_in_evaluation(dice: Dice) -> Run:
    """Predictions are looked at every eighth batch, and nobody calls train() again."""
    return Run(Sampling(dice, drops=True))


def zero_rate(dice: Dice) -> Run:
    module = Classifier(dice)
    module.rate = 0.0
    return Run(module)


def whole_epochs_of_warm_up(dice: Dice) -> Run:
    module = Classifier(dice)
    module.schedule = lambda made: optim.lr_scheduler.LambdaLR(made, lambda epoch: float(min(1, epoch // 5)))
    module.interval = "epoch"
    return Run(module)


def zero_factor(dice: Dice) -> Run:
    module = Classifier(dice)
    module.schedule = lambda made: optim.lr_scheduler.LambdaLR(made, lambda step: 1.0 * (step > 10**4))
    return Run(module)


def _ends(name: str, make: Callable[[Dice, Any], Any]) -> Make:
    def draw(dice: Dice) -> Run:
        module = Classifier(dice)
        module.schedule = lambda made: make(dice, made)
        return Run(module, options={"max_steps": 100 * STEPS})

    draw.__name__ = name
    return draw


schedulers = optim.lr_scheduler
exponential = _ends("exponential", lambda dice, made: schedulers.ExponentialLR(made, dice.uniform(0.5, 0.9)))
in_steps = _ends("in_steps", lambda dice, made: schedulers.StepLR(made, dice.randint(2, 8), 0.3))
in_a_line = _ends("in_a_line", lambda dice, made: schedulers.LinearLR(made, 1.0, 1e-6, dice.randint(10, 50)))
polynomial = _ends("polynomial", lambda dice, made: schedulers.PolynomialLR(made, total_iters=dice.randint(10, 50)))


class Repeating(Dataset[Any]):
    """Some of its items, whatever the index."""

    def __init__(self, dice: Dice, kinds: int) -> None:
        (self.x, self.y), self.kinds = sets.digits().train, kinds
        self.row = dice.randrange(500)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        row = self.row + index % self.kinds
        return self.x[row], self.y[row]


def one_item(dice: Dice) -> Run:
    return Run(Classifier(dice), DataLoader(Repeating(dice, 1), dice.choice([8, 16])))


def few_items(dice: Dice) -> Run:
    size = dice.choice([8, 16])
    return Run(Classifier(dice), DataLoader(Repeating(dice, size * dice.choice([1, 2])), size))


class Twice(IterableDataset[Any]):
    """Every worker's share is the whole: each batch comes several times."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        x, y = sets.digits().train
        for start in range(0, len(x) - self.size, self.size):
            for _ in range(3):
                yield from zip(x[start : start + self.size], y[start : start + self.size], strict=True)


def every_worker_reads_all(dice: Dice) -> Run:
    size = dice.choice([8, 16])
    return Run(Classifier(dice), DataLoader(Twice(size), size))


class DropoutOff(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for one in self.modules():
            if isinstance(one, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)):
                one.eval()


def dropout_layers_off(dice: Dice) -> Run:
    return Run(DropoutOff(dice, drops=True))


class DropoutBehind(Classifier):
    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.drop = nn.Dropout(0.3)
        self.join = lambda h: self.drop(h)

    def on_train_epoch_start(self) -> None:
        self.drop.eval()


def one_dropout_off(dice: Dice) -> Run:
    return Run(DropoutBehind(dice))


def a_number(dice: Dice) -> Run:
    module = Classifier(dice)
    module.finish = lambda loss: torch.tensor(loss.item(), requires_grad=True)
    return Run(module)


def detached_loss(dice: Dice) -> Run:
    module = Classifier(dice)
    module.finish = lambda loss: loss.detach().requires_grad_()
    return Run(module)


def loss_by_numpy(dice: Dice) -> Run:
    module = Classifier(dice)
    module.finish = lambda loss: torch.from_numpy(loss.detach().numpy().reshape(1)).requires_grad_().sum() * 1.0
    return Run(module)


MISTAKES: dict[str, tuple[Make, ...]] = {
    "parameter_not_in_optimizer": (only_the_head, without_the_neck, without_the_head),
    "parameter_without_gradient": (body_without_gradients, neck_without_gradients, gradients_disabled),
    "frozen_part": (frozen_body, frozen_neck, all_but_the_head_frozen),
    "detached_part": (detached, by_its_data, through_numpy),
    "gradient_not_zeroed": (never_cleared, clearing_overridden, another_is_cleared),
    "eval_mode": (evaluating, body_evaluating, left_in_evaluation),
    "learning_rate_zero": (zero_rate, whole_epochs_of_warm_up, zero_factor),
    "schedule_ended": (exponential, in_steps, in_a_line, polynomial),
    "data_repeats": (one_item, few_items, every_worker_reads_all),
    "dropout_off": (dropout_layers_off, one_dropout_off),
    "loss_without_graph": (a_number, detached_loss, loss_by_numpy),
}
"""Forms of each mistake."""


# ------------------------------------------------------------------------------------------------------------ meant


def _pretrained(dice: Dice, module: Classifier) -> Classifier:
    """The module, of which body and neck have been trained for a while on other labels."""
    x, y = sets.digits().train
    optimizer = optim.Adam(module.parameters(), 3e-3)
    for start in range(0, 640, 32):
        optimizer.zero_grad()
        functional.cross_entropy(module(x[start : start + 32]), 9 - y[start : start + 32]).backward()
        optimizer.step()
    optimizer.zero_grad()
    module.head.reset_parameters()
    return module


def transfer(dice: Dice) -> Run:
    module = _pretrained(dice, Classifier(dice))
    module.body.requires_grad_(False)
    module.body.eval() if dice.random() < 0.5 else None
    return Run(module)


def transfer_without_gradients(dice: Dice) -> Run:
    module = _pretrained(dice, Classifier(dice))
    module.body = WithoutGradients(module.body)
    return Run(module)


def transfer_by_the_optimizer(dice: Dice) -> Run:
    module = _pretrained(dice, Classifier(dice))
    module.trained = lambda: module.head.parameters()
    return Run(module)


def frozen_statistics(dice: Dice) -> Run:
    """Fine-tuning with batch norm as it was."""
    module = _pretrained(dice, Classifier(dice, drops=False))
    for one in module.modules():
        if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d):
            one.eval()
    return Run(module)


class Adapted(nn.Module):
    """A frozen layer with a trained one of low rank beside it."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def adapters(dice: Dice) -> Run:
    module = Classifier(dice)
    module.neck[0] = Adapted(module.neck[0], 4)  # type: ignore[operator, index, arg-type]
    if dice.random() < 0.5:
        _pretrained(dice, module)
        module.body.requires_grad_(False)
    return Run(module)


class Teacher(Classifier):
    """An average of the model that teaches it."""

    def __init__(self, dice: Dice, *, every: int = 1, trained: bool = True) -> None:
        super().__init__(dice)
        self.every = every
        self.teacher = nn.Sequential(copy.deepcopy(self.body), copy.deepcopy(self.neck), copy.deepcopy(self.head))
        self.teacher.requires_grad_(trained)

    def loss_of(self, batch: Any) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        scores = self(batch[0])
        return functional.cross_entropy(scores, batch[1]) + 0.1 * functional.cross_entropy(scores, target)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        keep = 0.99 if self.every == 1 else 0.0
        if batch_idx % self.every == self.every - 1:
            student = nn.Sequential(self.body, self.neck, self.head)
            for mine, its in zip(self.teacher.parameters(), student.parameters(), strict=True):
                mine.data.mul_(keep).add_(its.data, alpha=1 - keep)


def average_that_teaches(dice: Dice) -> Run:
    return Run(Teacher(dice))


def frozen_teacher(dice: Dice) -> Run:
    return Run(Teacher(dice, trained=False))


def target_network(dice: Dice) -> Run:
    return Run(Teacher(dice, every=100))


class Adversarial(pl.LightningModule):
    """A generator against a discriminator."""

    def __init__(self, dice: Dice) -> None:
        super().__init__()
        self.automatic_optimization, self.every = False, dice.choice([1, 5])
        self.order = dice.random() < 0.5
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        soft = functional.softplus
        made = self.generator(torch.randn(len(batch[0]), 8))
        judged = self.discriminator(made.detach())
        loss = (soft(-self.discriminator(batch[0])) + soft(judged)).mean()
        self._update(first, loss)
        if batch_idx % self.every == 0:
            self._update(second, soft(-self.discriminator(self.generator(torch.randn(16, 8)))).mean())

    def _update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad() if self.order else None
        self.manual_backward(loss)
        optimizer.step()
        None if self.order else optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = (self.discriminator, self.generator)
        return [optim.Adam(part.parameters(), 1e-3, betas=(0.0, 0.99)) for part in parts]


def adversarial(dice: Dice) -> Run:
    return Run(Adversarial(dice))


class Staged(Classifier):
    """The body is unfrozen in the third epoch; the optimizer has it from the start."""

    def on_train_epoch_start(self) -> None:
        self.body.requires_grad_(self.current_epoch > 2)

    def make(self, parameters: Any) -> optim.Optimizer:
        rest = [*self.neck.parameters(), *self.head.parameters()]
        return optim.Adam([{"params": self.body.parameters()}, {"params": rest}], 2e-3)


def staged_unfreezing(dice: Dice) -> Run:
    module = Staged(dice)
    module.body.requires_grad_(False)
    return Run(module)


class Backbone(Classifier):
    @property
    def backbone(self) -> nn.Module:
        return self.body


def finetuning_callback(dice: Dice) -> Run:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=lambda epoch: 1.5)
    return Run(Backbone(dice), callbacks=[callback])


class Unused(Classifier):
    """A head for another task, run or not."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.other, self.runs = nn.Linear(self.head.in_features, 3), dice.random() < 0.5  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.neck(self.body(x))
        if self.runs:
            self.other(h)
        return self.head(h)  # type: ignore[no-any-return]


def unused_head(dice: Dice) -> Run:
    return Run(Unused(dice))


class Probed(Classifier):
    """A probe on features that it does not change."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.probe = nn.Linear(self.head.in_features, 2)  # type: ignore[arg-type]

    def loss_of(self, batch: Any) -> Tensor:
        h = self.neck(self.body(batch[0]))
        probed = functional.cross_entropy(self.probe(h.detach()), batch[1] % 2)
        return functional.cross_entropy(self.head(h), batch[1]) + probed


def probe(dice: Dice) -> Run:
    return Run(Probed(dice))


class Alternating(Classifier):
    """Two tasks in turn."""

    def __init__(self, dice: Dice) -> None:
        super().__init__(dice)
        self.other = nn.Linear(self.head.in_features, 2)  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.neck(self.body(batch[0]))
        if batch_idx % 20 == 19:
            return functional.cross_entropy(self.other(h), batch[1] % 2)
        return functional.cross_entropy(self.head(h), batch[1])


def two_tasks(dice: Dice) -> Run:
    return Run(Alternating(dice))


def _scheduled(name: str, make: Callable[[Dice, Any], Any], **options: Any) -> Make:
    def draw(dice: Dice) -> Run:
        module = Classifier(dice)
        module.schedule = lambda made: make(dice, made)
        return Run(module, options=options)

    draw.__name__ = name
    return draw


warm_up = _scheduled("warm_up", lambda dice, made: schedulers.LambdaLR(made, lambda n: min(1.0, n / 500)))
as_short_as_the_run = _scheduled("as_short_as_the_run", lambda dice, made: schedulers.CosineAnnealingLR(made, STEPS))
warm_restarts = _scheduled(
    "warm_restarts",
    lambda dice, made: schedulers.CosineAnnealingWarmRestarts(made, dice.choice([16, 21, 32])),
    max_steps=100 * STEPS,
)


def accumulating(dice: Dice) -> Run:
    return Run(Classifier(dice), options={"accumulate_grad_batches": 3})


def accumulating_by_hand(dice: Dice) -> Run:
    return Run(Manual(dice, lambda optimizer: optimizer.zero_grad(set_to_none=dice.random() < 0.5), every=2))


def one_batch_by_heart(dice: Dice) -> Run:
    return Run(Classifier(dice), options={"overfit_batches": 1})


def whole_data_set_at_once(dice: Dice) -> Run:
    return Run(Classifier(dice), digits(dice, batch=1200), options={"max_epochs": STEPS})


def plain(dice: Dice) -> Run:
    return Run(Classifier(dice))


MEANT: tuple[Make, ...] = (
    *(plain, transfer, transfer_without_gradients, transfer_by_the_optimizer, frozen_statistics, adapters),
    *(average_that_teaches, frozen_teacher, target_network, adversarial, staged_unfreezing, finetuning_callback),
    *(unused_head, probe, two_tasks, warm_up, as_short_as_the_run, warm_restarts, accumulating, accumulating_by_hand),
    *(one_batch_by_heart, whole_data_set_at_once),
)
"""Runs of which nothing is to be said."""


class _Stop(pl.Callback):
    """Ends a run that has been seen, however long it was to be."""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.total_batch_idx + 1 >= STEPS * 3


def said(make: Make, seed: int, *, others: bool = False) -> NaNGuard:
    """The guard of the run that ``seed`` stands for, at its end.

    Args:
        make: A form.
        seed: Its seed.
        others: Whether its model is of those that no rule was built on.
    """
    name = make.__name__
    torch.manual_seed(seed)
    run, guard = make((Drawn if others else Dice)(f"{name} {seed}")), NaNGuard()
    folder = tempfile.mkdtemp(prefix="silent-")
    options: dict[str, Any] = {"max_epochs": 100, "max_steps": STEPS, **run.options}
    try:
        with quiet():
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
                callbacks=[guard, _Stop(), *run.callbacks],
                **options,
            )
            trainer.fit(run.module, digits(Dice(f"data {seed}")) if run.loader is None else run.loader)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return guard


def named(guard: NaNGuard) -> set[str]:
    """The mistakes that the first updates of a run have shown."""
    return {one.finding.cause for one in guard.advice if one.occasion == "first updates"}


def main(argv: list[str] | None = None) -> int:
    """Draw models, make each mistake, and print what is said, and what of that which is meant."""
    parser = argparse.ArgumentParser(prog="benchmarks.diagnose.silent", description=main.__doc__)
    parser.add_argument("--draws", type=int, default=3, help="seeds of each form")
    parser.add_argument("--first", type=int, default=1_040_000, help="first seed")
    parser.add_argument("--healthy", type=int, default=0, help="seeds of each healthy run of the rescue suite")
    parser.add_argument("--models", choices=("unseen", "built-on"), default="unseen", help="which models are drawn")
    parser.add_argument("--output", type=Path, help="a file for what was said, in JSON")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {
        "about": {"date": date.today().isoformat(), "torch": torch.__version__, "models": arguments.models,
                  "first_seed": arguments.first, "draws": arguments.draws},
    }  # fmt: skip
    if arguments.draws:
        seeds = range(arguments.first, arguments.first + arguments.draws)
        found["rows"] = _show(seeds, others=arguments.models == "unseen")
    if arguments.healthy:
        found["healthy"] = _show_healthy(range(arguments.first, arguments.first + arguments.healthy))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1))
    return 0


def _show(seeds: range, *, others: bool) -> list[dict[str, Any]]:
    rows = []
    print(f"{'mistake':30}  runs  right  said instead")
    for cause, makes in {**MISTAKES, "": MEANT}.items():
        told = [tuple(sorted(named(said(make, seed, others=others)))) for make in makes for seed in seeds]
        wanted = (cause,) if cause else ()
        instead = Counter(" + ".join(one) or "nothing" for one in told if one != wanted)
        right = sum(one == wanted for one in told)
        rows.append({"mistake": cause or "meant", "runs": len(told), "right": right, "instead": dict(instead)})
        words = ", ".join(f"{name} {count}" for name, count in instead.items())
        print(f"{cause or 'meant':30}  {len(told):4}  {right:5}  {words}", flush=True)
    return rows


def _show_healthy(seeds: range) -> dict[str, Any]:
    """Every word of the guard in its default mode, by occasion; up to a confidence of 0.5 it is a guess."""
    words: Counter[str] = Counter()
    for form in HEALTHY:
        for seed in seeds:
            case, guard = form.draw(seed), NaNGuard()
            train(case, [guard])
            for one in guard.advice:
                guess = " (a guess)" if one.finding.confidence <= LOW else ""
                words[f"{one.occasion}: {one.finding.cause}{guess}"] += 1
    runs = len(HEALTHY) * len(seeds)
    told = ", ".join(f"{name} {count}" for name, count in words.items()) or "nothing"
    print(f"{runs} healthy runs of the rescue suite: {told}", flush=True)
    return {"runs": runs, "words": dict(words)}


if __name__ == "__main__":
    raise SystemExit(main())
