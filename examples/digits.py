"""A small classifier and its data, the handwritten digits that come with scikit-learn. There is nothing to download.

Both names of Lightning work: ``LIGHTNING_PACKAGE`` chooses ``pytorch_lightning`` (the default) or
``lightning.pytorch``. In your own code, import the one that you use.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pl = importlib.import_module(os.environ.get("LIGHTNING_PACKAGE", "pytorch_lightning"))

CORRUPT_VALUES = (float("nan"), float("inf"), 1e30)
"""Values that a broken file or sensor may give. The corrupt samples get them in turn."""


class DigitsDataModule(pl.LightningDataModule):
    """1,347 images of 8 by 8 pixels to train on, 450 held out.

    Args:
        batch_size: Images in one batch.
        corrupt: Number of training images with four pixels of NaN, Inf or 1e30. They come back every epoch.
        seed: Decides the split and which images are corrupt.
    """

    def __init__(self, batch_size: int = 32, corrupt: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.corrupt = corrupt
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        pixels, labels = load_digits(return_X_y=True)
        split = train_test_split(pixels, labels, test_size=450, stratify=labels, random_state=self.seed)
        images, held_out = (torch.tensor(part / 8 - 1, dtype=torch.float32) for part in split[:2])
        targets, held_out_targets = (torch.tensor(part, dtype=torch.long) for part in split[2:])
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[: self.corrupt]
        for position, index in enumerate(chosen.tolist()):
            images[index, 26:30] = CORRUPT_VALUES[position % len(CORRUPT_VALUES)]
        self.train = TensorDataset(images, targets)
        self.held_out = TensorDataset(held_out, held_out_targets)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, batch_size=len(self.held_out))


class DigitsClassifier(pl.LightningModule):
    """A multi-layer perceptron for the ten digits.

    Args:
        lr: Learning rate at the start; a cosine schedule lowers it to zero. 0.05 suits ``"sgd"``, 0.005 ``"adam"``.
        optimizer: ``"sgd"`` has a momentum of 0.9.
        hidden: Width of the two hidden layers.
    """

    def __init__(self, lr: float = 0.05, optimizer: Literal["sgd", "adam"] = "sgd", hidden: int = 64) -> None:
        super().__init__()
        self.lr = lr
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Linear(64, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = nn.functional.cross_entropy(self(images), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, targets), prog_bar=True)
        self.log("val_acc", (logits.argmax(dim=1) == targets).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
