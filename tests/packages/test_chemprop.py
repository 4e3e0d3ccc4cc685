"""Inside chemprop: a message passing network on small molecules with descriptors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import numpy as np
import pytest
import torch

pytest.importorskip("chemprop")
from chemprop import data, models, nn

from tests.packages.package import Package, PackageTests, trainer_for


def molecules(bad: bool) -> data.MoleculeDataset:
    """Chains of carbon with other atoms; descriptors of two are Inf, and one is far out: NaN is a missing value to
    the package."""
    random = np.random.default_rng(0)
    made = []
    for index in range(192):
        chain = "".join(random.choice(["C", "C", "O", "N"], size=2 + index % 8))
        descriptors = random.normal(size=3)
        target = [0.3 * len(chain) + descriptors[0]]
        if bad and index in (60, 61):
            descriptors[1] = np.inf
        if bad and index == 120:
            descriptors[2] = 1e7
        made.append(data.MoleculeDatapoint.from_smi(f"C{chain}C", y=np.array(target), x_d=descriptors))
    return data.MoleculeDataset(made)


class Descent(models.MPNN):
    """The network, trained by gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.init_lr)


class Chemprop(Package):
    lightning = "lightning.pytorch"
    rate = 1e-2
    monitor = "train_loss_epoch"

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        message_passing = nn.BondMessagePassing(d_h=16, depth=2)
        predictor = nn.RegressionFFN(input_dim=16 + 3, hidden_dim=16)
        model = Descent(message_passing, nn.MeanAggregation(), predictor, init_lr=rate)
        trainer = trainer_for(callbacks, epochs, folder)
        trainer.fit(model, data.build_dataloader(molecules(bad), batch_size=16))
        return model

    def predict(self, model: Any) -> np.ndarray:
        trainer = lightning.pytorch.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        loader = data.build_dataloader(molecules(False), batch_size=16, shuffle=False)
        return torch.cat(trainer.predict(model, loader)).numpy()

    def save(self, model: Any, folder: Path) -> None:
        folder.mkdir()
        models.save_model(folder / "model.pt", model)

    def load(self, folder: Path) -> Any:
        return models.load_model(folder / "model.pt")


class TestChemprop(PackageTests):
    package: ClassVar[Package] = Chemprop()
