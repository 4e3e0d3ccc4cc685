"""Inside pytorch-forecasting: an N-HiTS on a few series."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("pytorch_forecasting")
import pandas as pd
from pytorch_forecasting import NHiTS, TimeSeriesDataSet
from pytorch_forecasting.metrics import RMSE

from tests.packages.package import Package, PackageTests, trainer_for, waves


def data(bad: bool) -> TimeSeriesDataSet:
    """Four waves; the last values of two are NaN, or far out, as after a faulty preparation."""
    parts = [
        pd.DataFrame({"series": f"s{index}", "time": np.arange(120), "value": values})
        for index, values in enumerate(waves(None))
    ]
    made = TimeSeriesDataSet(
        pd.concat(parts, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_unknown_reals=["value"],
    )
    if bad:
        for row, value in ((238, np.nan), (239, np.nan), (359, 1e7)):
            made.data["reals"][row] = value
            made.data["target"][0][row] = value
    return made


class PytorchForecasting(Package):
    lightning = "lightning.pytorch"
    rate = 1e-1
    monitor = "train_loss_epoch"

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        known = data(bad)
        model = NHiTS.from_dataset(
            known, hidden_size=16, learning_rate=rate, optimizer="sgd", loss=RMSE(), log_interval=0
        )
        trainer = trainer_for(callbacks, epochs, folder)
        trainer.fit(model, known.to_dataloader(train=True, batch_size=32))
        return model, trainer

    def predict(self, model: Any) -> np.ndarray:
        return model[0].predict(data(False), trainer_kwargs={"accelerator": "cpu", "logger": False}).numpy()

    def save(self, model: Any, folder: Path) -> None:
        model[1].save_checkpoint(folder / "model.ckpt")

    def load(self, folder: Path) -> Any:
        return NHiTS.load_from_checkpoint(folder / "model.ckpt"), None


class TestPytorchForecasting(PackageTests):
    package: ClassVar[Package] = PytorchForecasting()
