"""Inside neuralforecast: an MLP on a few series."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("neuralforecast")
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MSE
from neuralforecast.models import MLP

from tests.packages.package import Package, PackageTests, waves


def frame(bad: bool) -> pd.DataFrame:
    """Four waves; the last values of two are Inf, or far out: NaN is refused by the package itself."""
    times = pd.date_range("2020-01-01", periods=120, freq="D")
    parts = [
        pd.DataFrame({"unique_id": f"s{index}", "ds": times, "y": values})
        for index, values in enumerate(waves(np.inf if bad else None))
    ]
    return pd.concat(parts, ignore_index=True)


class NeuralForecastPackage(Package):
    lightning = "pytorch_lightning"
    rate = 3e-2
    # Windows are drawn in training_step from batches that all hold the outlier: it shows in its consequences alone.
    causes = Package.causes | {"learning_rate_too_high"}

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        model = MLP(
            h=6,
            input_size=24,
            hidden_size=16,
            num_layers=2,
            loss=MSE(),
            learning_rate=rate,
            num_lr_decays=-1,
            max_steps=10 * epochs,
            batch_size=2,
            windows_batch_size=16,
            optimizer=torch.optim.SGD,
            callbacks=callbacks,
            enable_checkpointing=True,
            accelerator="cpu",
            enable_progress_bar=False,
            default_root_dir=str(folder),
        )
        forecast = NeuralForecast([model], freq="D")
        forecast.fit(frame(bad))
        return forecast

    def predict(self, model: Any) -> np.ndarray:
        return model.predict(frame(False))["MLP"].to_numpy()

    def save(self, model: Any, folder: Path) -> None:
        model.save(str(folder), save_dataset=False)

    def load(self, folder: Path) -> Any:
        return NeuralForecast.load(str(folder))


class TestNeuralForecast(PackageTests):
    package: ClassVar[Package] = NeuralForecastPackage()
