"""A classifier whose middle can be chosen, its data, and runs of it: what commands and checks outside a run look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard
from tests.helpers import FaultAt, seed_all, trainer_for


class Numbers(LightningDataModule):
    """Vectors of six numbers and five classes that can be learned."""

    def __init__(self, scale: float = 1.0, bad: int = -1, count: int = 64) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        x = torch.randn(count, 6, generator=source)
        y = (x @ torch.randn(6, 5, generator=source)).argmax(1)
        x *= scale
        if bad >= 0:
            x[bad, 2] = torch.nan
        self.data = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=16, shuffle=True)


class Wrong(torch.autograd.Function):
    """Squares, with a derivative that lacks the factor of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Right(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MIDDLE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "wrong": lambda: Applied(Wrong),
    "right": lambda: Applied(Right),
    "reversed": lambda: Applied(Reversed),
    "dropout": lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Tanh()),
    "softmax": nn.ReLU,
    "detached": nn.ReLU,
}


class Model(LightningModule):
    """A classifier whose middle can be chosen."""

    def __init__(self, middle: str = "relu", lr: float = 0.1, log: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.middle, self.lr, self.of_log = middle, lr, log
        self.net = nn.Sequential(nn.Linear(6, 16), MIDDLE[middle](), nn.Linear(16, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[:2]
        logits = self.net(x)
        if self.middle == "softmax":
            logits = logits.softmax(1)
        if self.middle == "detached":
            logits = logits + self.net(x).detach().square()
        loss = F.cross_entropy(logits, y)
        if self.of_log:
            loss = loss + 0 * torch.log(x[:, 0] + 50).mean()
        self.log("loss", loss, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def make_model(lr: float = 0.1) -> Model:
    return Model(lr=lr, log=True)


def config(folder: Path, text: str = "", model: str = "", data: str = "") -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"seed_everything: 1\n{text}"
        "trainer: {accelerator: cpu, max_epochs: 3, callbacks: [{class_path: lightning_nanguard.NaNGuard}]}\n"
        f"model: {{class_path: tests.classifier.Model, init_args: {{{model}}}}}\n"
        f"data: {{class_path: tests.classifier.Numbers, init_args: {{{data}}}}}\n"
    )
    return path


def incident(folder: Path, fault: tuple[float, int] | None, **options: Any) -> tuple[NaNGuard, Path]:
    """A run with a value put into the input of a batch, and the folder of its first incident."""
    seed_all()
    guard = NaNGuard(bundle_dir=folder / "incidents", dirpath=folder)
    callbacks = [] if fault is None else [FaultAt("input", *fault)]
    trainer = trainer_for(folder, guard, callbacks, max_epochs=10, limit_val_batches=0)
    trainer.fit(Model(**options), Numbers())
    return guard, sorted((folder / "incidents").iterdir())[0]
