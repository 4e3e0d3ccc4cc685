"""What a package has to offer, and what is checked of each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback

from lightning_nanguard import NaNGuard
from lightning_nanguard.types import ActOn
from tests.helpers import copied, differences, learner_of, non_finite, random_state, seed_all

TOO_HIGH = 300.0


def waves(bad: float | None, far: float = 1e7, level: float = 0.0) -> list[np.ndarray]:
    """Four waves of 120 values.

    Args:
        bad: What the last two values of one wave are; another one ends far out then. ``None`` for neither.
        far: How far out.
        level: What the waves lie about.
    """
    random = np.random.default_rng(0)
    made = [level + np.sin(np.arange(120) / 5 + index) + 0.1 * random.normal(size=120) for index in range(4)]
    if bad is not None:
        made[1][-2:] = bad
        made[2][-1] = far
    return made


def trainer_for(callbacks: list[Any], epochs: int, folder: Path) -> Any:
    """A trainer for a module that a package leaves to the user to train."""
    return import_module("lightning.pytorch").Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


class Seen(Callback):
    """Keeps what a fit did and left behind; a package that copies its callbacks gets this one again."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.end: dict[str, Any] = {}
        self.epochs = 0

    def __deepcopy__(self, memo: Any) -> Seen:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, ()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(math.nan if loss is None else float(loss))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self.epochs = trainer.current_epoch
        self.end = copied({**learner_of(trainer, module), "metrics logged": dict(trainer.callback_metrics)})
        self.end["random"] = random_state()


@dataclass
class Fitted:
    """What a fit gives: the package's own object, and what was seen of the run."""

    model: Any
    seen: Seen
    guard: NaNGuard | None = field(default=None)

    def level(self) -> float:
        """Lower quartile of the finite losses in the last quarter of the run: that of batches without an outlier."""
        last = self.seen.losses[-len(self.seen.losses) // 4 :]
        return float(np.quantile([loss for loss in last if math.isfinite(loss)], 0.25))


class Package(ABC):
    """A package with one small model of its own, trained on small data made here.

    Attributes:
        lightning: Name of the Lightning that the package uses.
        rate: A learning rate at which the model learns.
        causes: Causes that may be named for the bad rows of the data.
        monitor: A metric that the model logs at the end of a training epoch.
        own_checkpoints: Pattern of the checkpoints that the package writes by itself, where one more callback that
            writes them cannot be given to it.
    """

    lightning: ClassVar[str]
    rate: ClassVar[float]
    causes: ClassVar[frozenset[str]] = frozenset({"non_finite_input", "unnormalised_input", "target_out_of_domain"})
    monitor: ClassVar[str] = "train_loss"
    own_checkpoints: ClassVar[str | None] = None

    @abstractmethod
    def fit(self, callbacks: list[Any], rate: float, epochs: int, *, bad: bool, folder: Path) -> Any:
        """Make model and data and train; the package's own object is returned.

        Args:
            callbacks: Given to the trainer in the package's own way.
            rate: Learning rate.
            epochs: Epochs, or as many updates as ten times that where the package counts updates.
            bad: Whether the data have NaN rows and an outlier.
            folder: Where the trainer may write.
        """

    @abstractmethod
    def predict(self, model: Any) -> np.ndarray:
        """What the model says of the clean data."""

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Save in the package's own way."""

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load what :meth:`save` has saved."""

    def run(
        self,
        guard: NaNGuard | None,
        folder: Path,
        *,
        rate: float | None = None,
        epochs: int = 6,
        bad: bool = False,
        callbacks: Sequence[Any] = (),
    ) -> Fitted:
        """Train from seeded random streams."""
        seen = Seen()
        seed_all()
        given = [*callbacks, seen, *([] if guard is None else [guard])]
        model = self.fit(given, self.rate if rate is None else rate, epochs, bad=bad, folder=folder)
        return Fitted(model, seen, guard)


class PackageTests:
    """Checks of one package; a class of its own for each gives ``package``."""

    package: ClassVar[Package]

    @pytest.mark.parametrize("act_on", ["certain", "evidence"])
    def test_a_healthy_run_is_the_same_bit_for_bit(self, act_on: ActOn, tmp_path: Path) -> None:
        """Losses, weights, optimizer state, metrics and random streams are those of the run without the guard."""
        bare = self.package.run(None, tmp_path / "bare")
        guard = NaNGuard(act_on=act_on)
        with_guard = self.package.run(guard, tmp_path / "guard")
        assert len(bare.seen.losses) >= 48
        assert bare.seen.losses == with_guard.seen.losses
        assert differences(bare.seen.end, with_guard.seen.end) == []
        assert list(guard.interventions) == []
        assert "updates watched" in guard.summary()
        assert f"NaNGuard: {len(bare.seen.losses)} updates" in guard.summary()

    def test_nan_rows_and_an_outlier_are_survived_and_explained(self, tmp_path: Path) -> None:
        """Weights end finite, the model has learned as without the bad rows, and each record names the data."""
        untrained = self.package.run(None, tmp_path / "untrained", rate=1e-12)
        guard = NaNGuard()
        done = self.package.run(guard, tmp_path / "guard", bad=True)
        assert non_finite(done.seen.end["parameters"]) == []
        assert np.isfinite(self.package.predict(done.model)).all()
        assert done.level() < untrained.level()
        told = {(one.fault, one.cause) for one in guard.interventions}
        assert {cause for _, cause in told} <= self.package.causes, told
        assert "non_finite_input" in {cause for _, cause in told}, told
        assert len({fault for fault, _ in told}) >= 1

    @pytest.mark.parametrize("act_on", ["certain", "evidence"])
    def test_a_rate_far_too_high_is_saved(self, act_on: ActOn, tmp_path: Path) -> None:
        """A run that ends non-finite without the guard ends finite with it, and better than untrained."""
        high = TOO_HIGH * self.package.rate
        untrained = self.package.run(None, tmp_path / "untrained", rate=1e-12)
        lost = Seen()
        try:
            seed_all()
            self.package.fit([lost], high, 6, bad=False, folder=tmp_path / "bare")
        except (ValueError, ArithmeticError, RuntimeError):
            lost.losses.append(math.nan)
        assert not all(map(math.isfinite, lost.losses))
        guard = NaNGuard(act_on=act_on)
        done = self.package.run(guard, tmp_path / "guard", rate=high)
        assert len(guard.interventions) > 0
        assert non_finite(done.seen.end["parameters"]) == []
        assert np.isfinite(self.package.predict(done.model)).all()
        assert done.level() < untrained.level()

    def test_early_stopping_checkpoints_and_the_packages_own_files(self, tmp_path: Path) -> None:
        """EarlyStopping and ModelCheckpoint do their part, and what the package saves and loads predicts the same."""
        callbacks = import_module(f"{self.package.lightning}.callbacks")
        stopping = callbacks.EarlyStopping(
            self.package.monitor, patience=2, min_delta=1e9, check_on_train_epoch_end=True
        )
        saving = callbacks.ModelCheckpoint(
            tmp_path / "kept", monitor=self.package.monitor, save_on_train_epoch_end=True
        )
        guard = NaNGuard(last_good_every_n_steps=2)
        own = self.package.own_checkpoints
        done = self.package.run(guard, tmp_path, callbacks=[stopping] if own else [stopping, saving], epochs=12)
        assert done.seen.epochs <= 5
        kept = list(tmp_path.glob(own or "kept/*.ckpt"))
        assert len(kept) >= 1
        for path in [*kept, guard.run_dir / "nanguard-last-good.ckpt"]:
            content = torch.load(path, weights_only=False)
            assert non_finite(content["state_dict"]) == []
            assert any("NaNGuard" in key for key in content.get("callbacks", ["NaNGuard"]))
        self.package.save(done.model, tmp_path / "saved")
        loaded = self.package.load(tmp_path / "saved")
        seed_all()
        before = self.package.predict(done.model)
        seed_all()
        assert np.array_equal(before, self.package.predict(loaded))
