"""Inside scvi-tools: an SCVI on counts of a few genes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("scvi")
import anndata
import scvi

from tests.packages.package import Package, PackageTests


def counts(bad: bool) -> anndata.AnnData:
    """Cells of two kinds; two rows are NaN, and one count is far out."""
    random = np.random.default_rng(0)
    means = random.gamma(2.0, 2.0, size=(2, 30))
    values = random.poisson(means[np.arange(256) % 2]).astype(np.float32)
    if bad:
        values[100:102] = np.nan
        values[200, 3] = 1e12
    data = anndata.AnnData(values)
    scvi.model.SCVI.setup_anndata(data)
    return data


class Scvi(Package):
    lightning = "lightning.pytorch"
    rate = 1e-2

    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        scvi.settings.seed = 1
        scvi.settings.logging_dir = str(folder)  # else checkpoints go to the working directory
        model = scvi.model.SCVI(counts(bad), n_hidden=16, n_latent=4)
        model.train(
            max_epochs=epochs,
            accelerator="cpu",
            train_size=0.9,
            shuffle_set_split=False,
            batch_size=24,
            plan_kwargs={
                "optimizer": "Custom",
                "optimizer_creator": lambda parameters: torch.optim.SGD(parameters, lr=rate),
            },
            callbacks=callbacks,
            enable_checkpointing=True,
            enable_progress_bar=False,
            default_root_dir=str(folder),
        )
        return model

    def predict(self, model: Any) -> np.ndarray:
        return model.get_latent_representation(counts(False))

    def save(self, model: Any, folder: Path) -> None:
        model.save(str(folder))

    def load(self, folder: Path) -> Any:
        return scvi.model.SCVI.load(str(folder), counts(False))


class TestScvi(PackageTests):
    package: ClassVar[Package] = Scvi()
