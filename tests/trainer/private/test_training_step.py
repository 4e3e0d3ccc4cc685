"""Forward and backward of one batch outside the loops; that they leave no trace is in test_untraced.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.compile import from_compiled
from torch import nn

from lightning_nanguard.distributed.collectives import ForbidCollectives
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.private.training_step import (
    BareStep,
    alone,
    as_in_training,
    clip_as_configured,
    compiled_by_lightning,
)
from tests.helpers import Batch, Task, batches, fit, mlp, task


class Runs(Callback):
    """Runs the first batch once more at its end, and notes the largest gradient before and after clipping."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx:
            return
        optimizer = trainer.optimizers[0]
        strategy = trainer.strategy
        wrapper = strategy.model = nn.Identity()  # stands for what wraps the module among ranks
        with alone(trainer, ForbidCollectives()):
            assert strategy.model is pl_module
            self.loss = BareStep(trainer).forward_backward(optimizer, batch, batch_idx)
        assert strategy.model is wrapper
        strategy.model = pl_module
        self.largest.append(self.largest_of(pl_module))
        clip_as_configured(trainer, optimizer)
        self.largest.append(self.largest_of(pl_module))
        optimizer.zero_grad(set_to_none=True)

    def largest_of(self, module: Task) -> float:
        return max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("algorithm", ["value", None])
def test_gradients_are_unscaled_and_clipped_as_configured(algorithm: str | None, tmp_path: Path) -> None:
    """With a GradScaler the gradients are those without its scale, which stays; clipping is the trainer's own."""
    runs, plain = Runs(), Runs()
    clip = {} if algorithm is None else {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    scaled = fit(task(), batches(count=1), callbacks=[runs], folder=tmp_path, precision="16-mixed", **clip)
    fit(task(), batches(count=1), callbacks=[plain], folder=tmp_path, **clip)
    assert scaled.trainer.precision_plugin.scaler.get_scale() == 1024.0
    assert runs.loss == pytest.approx(plain.loss, rel=0.01)
    assert runs.largest[0] == pytest.approx(plain.largest[0], rel=0.05)
    assert runs.largest[1] == (pytest.approx(0.01) if algorithm else runs.largest[0])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss(tmp_path: Path) -> None:
    """Where ``training_step`` gives a dictionary its loss counts; where it gives nothing there is none."""
    seen: list[float | None] = []

    class Gives(Task):
        gives: Any = None

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return {"loss": torch.tensor(2.0, requires_grad=True), "x": 1} if batch_idx == 0 else None

    class Reruns(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
        ) -> None:
            step = BareStep(trainer)
            seen.append(step.loss(batch, batch_idx))
            seen.append(step.forward_backward(trainer.optimizers[0], batch, batch_idx))

    fit(Gives(mlp()), batches(count=2), callbacks=[Reruns()], folder=tmp_path)
    assert seen == [2.0, 2.0, None, None]


@pytest.mark.parametrize("depth", [1, 2])
def test_containers_are_restored_as_deep_as_the_thresholds_say(depth: int, tmp_path: Path) -> None:
    """What the step removes from a container comes back, down to the depth that the user set."""
    left: list[list[str]] = []

    class Removes(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if isinstance(batch, dict):
                batch["inner"].pop("extra")
                batch = batch.pop("xy")
            return super().training_step(batch, batch_idx)

    class Reruns(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
        ) -> None:
            nested: dict[str, Any] = {"xy": batch, "inner": {"extra": 1}}
            assert BareStep(trainer, RepeatedStepsThresholds(depth=depth)).loss(nested, batch_idx) is not None
            left.append([*nested, *nested["inner"]])

    fit(Removes(mlp()), batches(count=1), callbacks=[Reruns()], folder=tmp_path)
    assert left == [["xy", "inner", *(["extra"] if depth == 2 else [])]]


def test_a_compiled_module_is_known() -> None:
    """What Lightning leaves on a module that ``torch.compile`` was given, before anything is compiled."""
    module = task("mlp")
    assert not compiled_by_lightning(module)
    assert compiled_by_lightning(from_compiled(torch.compile(module, backend="eager")))  # type: ignore[arg-type]


class Within(Task):
    """Looks at a part of the validation as if it trained; one of its layers is always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.frozen = nn.Dropout()
        self.seen: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def look(self) -> None:
        stage = self.trainer.training, self.trainer.validating
        modes = self.training, self.net.training, self.frozen.training
        self.seen.append((*stage, *modes, torch.is_grad_enabled()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.look()
        with as_in_training(self.trainer):
            self.look()
        self.look()

    def on_train_batch_end(self, *args: Any) -> None:
        with as_in_training(self.trainer):
            self.look()


def test_inside_all_is_as_in_training() -> None:
    """Stage, the mode of each module and gradients are those of training inside, and as before afterwards."""
    module = Within()
    fit(module, batches(count=1), val=batches(count=1))
    validates, trains = (False, True, False, False, False, False), (True, False, True, True, False, True)
    assert module.seen == [trains, validates, trains, validates]
