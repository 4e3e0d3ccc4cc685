"""Inside GluonTS: a feed-forward network on a few series."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("gluonts")
pytest.importorskip("gluonts.torch")
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import SimpleFeedForwardEstimator
from gluonts.torch.distributions import NormalOutput
from gluonts.torch.model.simple_feedforward.lightning_module import SimpleFeedForwardLightningModule

from tests.packages.package import Package, PackageTests, waves


def series(bad: bool) -> ListDataset:
    """Four waves; the last values of two are Inf, or far out: NaN is a missing value to the package."""
    start = pd.Period("2020-01-01", freq="D")
    known = waves(np.inf if bad else None, far=1e12, level=3.0)
    return ListDataset([{"target": values, "start": start} for values in known], freq="D")


class Descent(SimpleFeedForwardLightningModule):
    """The network, trained by gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


class Estimator(SimpleFeedForwardEstimator):
    def create_lightning_module(self) -> Descent:
        made = super().create_lightning_module()
        made.__class__ = Descent
        return made


class GluonTS(Package):
    lightning = "lightning.pytorch"
    rate = 1e-2
    own_checkpoints = "*/version_*/checkpoints/*.ckpt"

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        estimator = Estimator(
            prediction_length=6,
            context_length=24,
            hidden_dimensions=[16],
            distr_output=NormalOutput(),
            lr=rate,
            batch_size=16,
            num_batches_per_epoch=10,
            trainer_kwargs={
                "max_epochs": epochs,
                "accelerator": "cpu",
                "callbacks": callbacks,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
            },
        )
        return estimator.train(series(bad))

    def predict(self, model: Any) -> np.ndarray:
        return np.stack([forecast.mean for forecast in model.predict(series(False))])

    def save(self, model: Any, folder: Path) -> None:
        folder.mkdir()
        model.serialize(folder)

    def load(self, folder: Path) -> Any:
        return Predictor.deserialize(folder)


class TestGluonTS(PackageTests):
    package: ClassVar[Package] = GluonTS()
