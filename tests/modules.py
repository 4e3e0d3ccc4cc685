"""Modules, callbacks and data for training modes that tests/helpers.py does not need; one copy of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import IterableDataset

from tests.helpers import OUTPUTS, Batch, Task, mlp


class NaNWeight(Callback):
    """Sets the first element of a tensor of the module to NaN after so many training batches."""

    def __init__(self, after: int | Iterable[int], name: str | None = None, value: float = math.nan) -> None:
        self.after = {after} if isinstance(after, int) else set(after)
        self.name = name
        self.value = value
        self.batches = 0
        self.hits = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches += 1
        if self.batches in self.after:
            tensors = {**dict(pl_module.named_buffers()), **dict(pl_module.named_parameters())}
            name = self.name or next(n for n, p in pl_module.named_parameters() if p.requires_grad)
            with torch.no_grad():
                tensors[name].view(-1)[0] = self.value
            self.hits += 1


class Diverge(Callback):
    """Blows the weights up after the given updates, so far that the loss overflows while every weight is finite.

    It is the learner that is at fault then, whatever the batch: the loss is as bad at a second look, and good under
    older weights. Told by ``global_step``, so that a resumed run counts on.
    """

    def __init__(self, *after: int) -> None:
        self.after = set(after)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step in self.after:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(1e25)


class SaveAt(Callback):
    """Saves the whole run after so many updates, and ends it there on request."""

    def __init__(self, step: int, path: Path, stop: bool = False) -> None:
        self.step = step
        self.path = path
        self.stop = stop

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


class Rates(Callback):
    """What every step really used: the first group's rate, read inside ``optimizer.step``."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The guard comes before this callback, so its own hook runs first.
        trainer.optimizers[0].register_step_post_hook(self._note)

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.used.append(float(optimizer.param_groups[0]["lr"]))


class Gan(LightningModule):
    """Manual optimization of a generator and a discriminator that train each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        real, _ = batch
        generator, discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), 3))
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        judge = nn.functional.binary_cross_entropy_with_logits
        self.toggle_optimizer(discriminator)
        loss = judge(self.discriminator(real), ones) + judge(self.discriminator(fake.detach()), zeros)
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        loss = judge(self.discriminator(fake), ones)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> list[Optimizer]:
        return [AdamW(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)]


class OwnClipping(Task):
    """Clips with a value of its own."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class SometimesNone(Task):
    """Every third training step returns None."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class GivesDict(Task):
    """The loss in a dictionary, with something beside it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "note": "kept"}


class Quiet(Task):
    """Logs nothing, so that a compiler takes the whole step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()


class FromIterator(Task):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
        batch, _, _ = next(dataloader_iter)
        return (self.net(batch[0]) - batch[1]).square().mean()


class Stream(IterableDataset[Batch]):
    """Batches without a length."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data)


class Masked(nn.Module):
    """Attention over the six inputs under a causal mask of −inf that is no poison, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(1, 4)
        self.head = nn.Linear(6 * 4, OUTPUTS)
        self.register_buffer("mask", torch.full((6, 6), -math.inf).triu(1))
        self.register_buffer("running", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x.unsqueeze(-1))
        if self.training:
            with torch.no_grad():
                self.running.mul_(0.9).add_(key.mean() * 0.1)
        weights = (key @ key.mT + self.mask).softmax(-1)
        return self.head((weights @ key).flatten(1)) + 0 * self.running


class Complex(nn.Module):
    """A complex layer between two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.rotation = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64) / 2)
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.first(x).to(torch.complex64) @ self.rotation
        return self.head(torch.tanh(turned.real + turned.imag))


class Tied(nn.Module):
    """The second layer is the first one, transposed by hand through one shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Unused(nn.Module):
    """One layer that takes no part, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.idle = nn.Linear(3, 3)
        self.frozen = nn.Linear(OUTPUTS, OUTPUTS).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.net(x))


def lazy() -> nn.Module:
    """Layers whose sizes the first batch decides."""
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(OUTPUTS))


class Unfreeze(BaseFinetuning):
    """The first layer is frozen in epoch 0 and joins the optimizer, in a group of its own, in epoch 1."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.005)


class TwoGroups(Task):
    """Two groups with rates of their own, one of them tied to weight decay."""

    def configure_optimizers(self) -> Optimizer:
        return AdamW(
            [
                {"params": self.net[0].parameters(), "lr": 0.003},
                {"params": self.net[2].parameters(), "lr": 0.01, "weight_decay": 0.1},
            ]
        )


def bug(reason: str) -> pytest.MarkDecorator:
    """Marks a test that shows a bug; the test fails as soon as the bug is gone, so that the mark goes too."""
    return pytest.mark.xfail(strict=True, reason=reason)


def make(net: Callable[[], nn.Module] = mlp, kind: Callable[..., Task] = Task, **options: Any) -> Callable[[], Task]:
    """A factory of the same task at every call."""

    def build() -> Task:
        torch.manual_seed(0)
        return kind(net(), **options)

    return build


def sgd(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    return SGD(parameters, **{"lr": 0.05, **options})


def update_by_hand(module: LightningModule, loss: Tensor) -> None:
    """Makes one update of a module under manual optimization."""
    optimizer: Any = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()
