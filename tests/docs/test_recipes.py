"""Each recipe of ``docs/recipes.md`` is run with a fault that it has to handle."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard, TrainingDivergedError

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+)\n(?:(?!^## )[\s\S])*?```yaml\n([\s\S]*?)```", PAGE, re.MULTILINE))
UPDATES = 48


class Data(LightningDataModule):
    """A regression, in which the chosen rows are not finite."""

    def __init__(self, bad_rows: int = 0, bad_from: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(UPDATES * 8, 4, generator=generator)
        targets = inputs.sum(1, keepdim=True)
        inputs[bad_from : bad_from + bad_rows, 1] = torch.nan
        self.rows = TensorDataset(inputs, targets)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.rows, batch_size=8)


class Net(LightningModule):
    """Two layers, trained by plain gradient descent; the first one can be frozen."""

    def __init__(self, lr: float = 0.05, frozen: bool = False) -> None:
        super().__init__()
        self.lr = lr
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        if frozen:
            # As trained somewhere else: no initialisation makes such weights.
            nn.init.uniform_(self.net[0].weight, 0.3, 0.9)
            self.net[0].requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs).float(), targets.float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=self.lr)


class Gan(LightningModule):
    """A generator and a discriminator of one layer each, under manual optimization."""

    def __init__(self, lr: float = 0.05, frozen: bool = False) -> None:
        super().__init__()
        self.lr = lr
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, _ = batch
        generated = self.generator(torch.randn(len(real), 2))
        first, second = self.optimizers()
        loss = nn.functional.softplus(self.discriminator(generated.detach())) + nn.functional.softplus(
            -self.discriminator(real)
        )
        self._update(second, loss.mean())
        self._update(first, nn.functional.softplus(-self.discriminator(generated)).mean())

    def _update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.generator, self.discriminator)]


def train(title: str, folder: Path, module: type = Net, **arguments: Any) -> tuple[NaNGuard, LightningModule]:
    """Train with the recipe of this title, under LightningCLI."""
    config = yaml.safe_load(RECIPES[title])
    precision = config["trainer"].pop("precision", None)
    if precision == "16-mixed":  # on the CPU, Lightning itself has no scaler
        scaler = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 1024.0}}
        plugin = {"precision": precision, "device": "cpu", "scaler": scaler}
        config["trainer"]["plugins"] = [
            {"class_path": "pytorch_lightning.plugins.precision.MixedPrecision", "init_args": plugin}
        ]
    elif precision is not None:
        config["trainer"]["precision"] = precision
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    config["trainer"] |= dict.fromkeys(quiet, False)
    config["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(folder)}
    config["seed_everything"] = 0
    config["data"] = {name: value for name, value in arguments.items() if name.startswith("bad")}
    config["model"] = {name: value for name, value in arguments.items() if not name.startswith("bad")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    program = sys.argv
    sys.argv = ["train.py"]  # LightningCLI looks at it even if it is given its arguments
    try:
        cli = LightningCLI(module, Data, args=["--config", str(path)], run=False, save_config_callback=None)
    finally:
        sys.argv = program
    (guard,) = [one for one in cli.trainer.callbacks if isinstance(one, NaNGuard)]
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
    except TrainingDivergedError:
        assert guard.interventions[-1].remedies == ("stop",)
    return guard, cli.model


def done(guard: NaNGuard) -> set[str]:
    """Every word for what the guard did."""
    return {word for record in guard.interventions for word in record.remedies}


def finite(module: LightningModule) -> bool:
    """Whether all weights are finite."""
    return all(bool(weight.isfinite().all()) for weight in module.parameters())


def skips_a_bad_row(title: str, folder: Path) -> NaNGuard:
    """The recipe skips a batch with a row that is not finite, and does nothing else."""
    guard, module = train(title, folder, bad_rows=1, bad_from=83)
    assert done(guard) == {"skip"}
    assert finite(module)
    return guard


def default(folder: Path) -> None:
    """A bad row costs its batch, a run that diverges is rolled back, and what is written out is the default."""
    skips_a_bad_row("The default", folder)
    guard, module = train("The default", folder, lr=50.0)
    assert finite(module)
    assert "restore" in done(guard)
    assert repr(guard) == repr(NaNGuard())


def evidence(folder: Path) -> None:
    """A run that diverges is saved, and the summary names the setting."""
    guard, module = train("Save runs that stay finite", folder, lr=50.0)
    assert finite(module)
    assert 'act_on="evidence"' in guard.summary()


def only_watch(folder: Path) -> None:
    """The weights are lost, as without the guard, and the record says what would have been done."""
    guard, module = train("Only watch", folder, bad_rows=1, bad_from=83)
    assert not finite(module)
    assert not guard.interventions[0].applied
    assert guard.interventions[0].remedies == ("skip",)


def skip_only(folder: Path) -> None:
    """Even a run that diverges is only skipped."""
    guard, _ = train("Skip only", folder, lr=50.0)
    assert done(guard) <= {"skip", "stop"}
    assert guard.lr_multiplier == 1.0
    skips_a_bad_row("Skip only", folder)


def halve(folder: Path) -> None:
    """The first cut is a half, the next a quarter, and it is deeper at once for a rate that is far too high."""
    for lr, cuts in ((0.5, [0.5]), (0.7, [0.5, 0.25])):
        guard, module = train("Halve the learning rate", folder, lr=lr)
        assert finite(module)
        assert [one.lr_after / one.lr_before for one in guard.interventions] == pytest.approx(cuts)
    guard, module = train("Halve the learning rate", folder, lr=50.0)
    assert finite(module)
    assert guard.interventions[0].lr_after < 0.1 * guard.interventions[0].lr_before


def clip_first(folder: Path) -> None:
    """A run that diverges is clipped at the value of the recipe."""
    guard, module = train("Clip first", folder, lr=50.0)
    assert finite(module)
    assert {"restore", "clip"} <= done(guard)
    assert guard.clip_val in (None, 1.0)


def strict_stop(folder: Path) -> None:
    """A bad row is skipped, a fourth bad batch in a row ends the run, and so does a divergence."""
    skips_a_bad_row("Strict stop", folder)
    guard, module = train("Strict stop", folder, bad_rows=32, bad_from=240)
    assert [one.remedies for one in guard.interventions] == [("skip",), ("skip",), ("skip",), ("stop",)]
    assert finite(module)
    guard, module = train("Strict stop", folder, lr=50.0)
    assert "stop" in done(guard)
    assert finite(module)


def pre_training(folder: Path) -> None:
    """A bad row costs its batch, and the webhook that nobody answers does not harm the run."""
    skips_a_bad_row("Pre-training a language model", folder)


def gan(folder: Path) -> None:
    """Under manual optimization a bad row costs its updates, and a run that diverges ends with finite weights."""
    guard, module = train("A GAN", folder, Gan, bad_rows=1, bad_from=83)
    assert done(guard) == {"skip"}
    assert finite(module)


def fp16(folder: Path) -> None:
    """With a GradScaler a bad row costs its batch."""
    skips_a_bad_row("fp16", folder)


def transfer_learning(folder: Path) -> None:
    """A bad row costs nothing but itself, and the frozen part is not reported."""
    guard, module = train("Transfer learning", folder, bad_rows=1, bad_from=83, frozen=True)
    assert done(guard) == {"keep good samples"}
    assert finite(module)
    assert "frozen_part" not in {one.finding.cause for one in guard.advice}


def hydra(folder: Path) -> None:
    """Hydra makes the guard that the recipe describes."""
    made = pytest.importorskip("hydra.utils").instantiate(yaml.safe_load(RECIPES["Hydra"]))
    guard = made["callbacks"]["nanguard"]
    assert isinstance(guard, NaNGuard)
    assert "remedies=[Rollback, ReduceLR]" in repr(guard)


CHECKS: dict[str, Callable[[Path], None]] = {
    "The default": default,
    "Save runs that stay finite": evidence,
    "Only watch": only_watch,
    "Skip only": skip_only,
    "Halve the learning rate": halve,
    "Clip first": clip_first,
    "Strict stop": strict_stop,
    "Pre-training a language model": pre_training,
    "A GAN": gan,
    "fp16": fp16,
    "Transfer learning": transfer_learning,
    "Hydra": hydra,
}


# Lightning calls parts of jsonargparse that are deprecated, and gives advice to somebody who trains for real.
@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning", "ignore:.*LightningCLI's args parameter"
)
@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title: str, tmp_path: Path) -> None:
    """The recipe does what its text says, in a run with a fault."""
    CHECKS[title](tmp_path)


def test_no_check_without_a_recipe() -> None:
    """Every check belongs to a recipe of the page."""
    assert CHECKS.keys() == RECIPES.keys()
