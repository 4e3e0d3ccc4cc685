"""Inside darts: an N-BEATS on a few series."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("darts")
from darts import TimeSeries
from darts.models import NBEATSModel
from darts.utils.serialization import safe_globals

from tests.packages.package import Package, PackageTests, Seen, waves


def series(bad: bool) -> list[TimeSeries]:
    """Four waves; the last values of two are NaN, or far out."""
    return [TimeSeries.from_values(values.astype(np.float32)) for values in waves(np.nan if bad else None)]


class Darts(Package):
    lightning = "pytorch_lightning"
    rate = 1e-2
    own_checkpoints = "*/checkpoints/*.ckpt"

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        model = NBEATSModel(
            24,
            6,
            num_stacks=2,
            num_blocks=1,
            num_layers=2,
            layer_widths=16,
            batch_size=32,
            n_epochs=epochs,
            optimizer_cls=torch.optim.SGD,
            optimizer_kwargs={"lr": rate},
            random_state=1,
            work_dir=str(folder),
            save_checkpoints=True,
            force_reset=True,
            pl_trainer_kwargs={"callbacks": callbacks, "accelerator": "cpu", "enable_progress_bar": False},
        )
        return model.fit(series(bad))

    def predict(self, model: Any) -> np.ndarray:
        return np.stack([one.values() for one in model.predict(6, series(False), verbose=False)])

    def save(self, model: Any, folder: Path) -> None:
        folder.mkdir()
        model.save(str(folder / "model.pt"))

    def load(self, folder: Path) -> Any:
        # The package loads no callback but Lightning's own unless it is told which classes to trust.
        ours = [
            one for one in torch.serialization.get_safe_globals() if one.__module__.startswith("lightning_nanguard")
        ]
        with safe_globals([*ours, Counter, deque, Seen]):
            return NBEATSModel.load(str(folder / "model.pt"))


class TestDarts(PackageTests):
    package: ClassVar[Package] = Darts()
