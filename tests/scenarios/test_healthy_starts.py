"""Healthy runs whose modules are unusual: nothing is done, nothing ends, and the same bits are left."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, TrainingDivergedError
from tests.helpers import Task, batches, differences, fit, mlp, state_of, trainer_for, with_nan
from tests.odd_tensors import ODD, QUIET, EightBitMomentum

pytestmark = [pytest.mark.filterwarnings(one) for one in QUIET]


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD([p for p in self.parameters() if p.device.type != "meta"], lr=0.01, momentum=0.9)


class NoOptimizer(Base):
    def configure_optimizers(self) -> None:
        return None


class VectorLoss(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self.net(batch[0]) - batch[1]).square()
        self.manual_backward(loss, gradient=torch.full_like(loss, 1 / loss.numel()))
        optimizer.step()


class MaskParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.full((8, 8), -math.inf).triu(1), requires_grad=False)


class TrainableInf(Base):
    """One logit of −inf is never chosen; its gradient is 0, and it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 0.5, -math.inf]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = torch.softmax(self.logits, 0)
        return super().training_step(batch, batch_idx) * (1 + weights[0])

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.parameters(), 0.01)


class UnusedNaN(Base):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.tensor([1.0, math.nan]))


class FrozenFirst(Base):
    """Nothing in the module trains in the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.shift = torch.zeros(1, requires_grad=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.shift.sum()

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(self.current_epoch > 0)


class Minimum(Base):
    """A buffer that is set to Inf on purpose, as observers and running minima are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 12 >= 9:
            self.lowest.copy_(torch.minimum(self.lowest, loss.detach()))
        return loss


class ResetEachEpoch(Minimum):
    def on_train_epoch_start(self) -> None:
        self.lowest.fill_(math.inf)


class ResetInStep(Minimum):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 12 == 0:
            self.lowest = torch.full((3,), math.inf)
        return super().training_step(batch, batch_idx)


class TrainedTagged(Base):
    """A parameter of a subclass of Tensor, whose gradients are of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(ODD["tagged"]())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.odd.square().mean()


class TrainedJagged(Base):
    """A nested parameter, whose gradients are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(ODD["jagged"]())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) + (self.odd * self.odd).values().mean())
        optimizer.step()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1, foreach=False)


class OnMeta(Base):
    """A buffer and a parameter without numbers; Lightning cannot move them, so they come after that and go before."""

    def on_fit_start(self) -> None:
        self.register_buffer("odd", torch.ones(3, device="meta"))
        self.odd_weight = nn.Parameter(torch.ones(3, device="meta"))

    def on_train_end(self) -> None:
        del self.odd, self.odd_weight


def with_buffer(kind: str) -> Callable[[], Base]:
    def make() -> Base:
        module = Base()
        module.register_buffer("odd", ODD[kind](), persistent=False)
        return module

    return make


def with_parameter(kind: str) -> Callable[[], Base]:
    def make() -> Base:
        module = Base()
        module.odd = nn.Parameter(ODD[kind](), requires_grad=False)
        return module

    return make


class EightBits(Base):
    def configure_optimizers(self) -> Optimizer:
        return EightBitMomentum(self.parameters(), lr=0.1)


class Complex(Base):
    """Complex parameters that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1 + 0.5j, 0.3j]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.turn * (1 + 1j)).abs().square().mean()


MODULES = (
    NoOptimizer, VectorLoss, MaskParameter, TrainableInf, UnusedNaN, FrozenFirst, ResetEachEpoch, ResetInStep,
    EightBits, Complex, TrainedTagged, TrainedJagged, OnMeta,
)  # fmt: skip
MAKES: dict[str, Callable[[], Base]] = {
    **{kind.__name__: kind for kind in MODULES},
    **{f"{kind} buffer": with_buffer(kind) for kind in ODD if kind != "meta"},
    **{f"{kind} parameter": with_parameter(kind) for kind in ODD if kind not in ("quantised", "mkldnn", "meta")},
}


def run(make: Callable[[], Base], guard: NaNGuard | None, data: Any = None, **options: Any) -> Base:
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(1)
    data = batches(count=24) if data is None else data
    trainer_for(None, guard, **{"max_epochs": 2, **options}).fit(module, DataLoader(data, batch_size=None))
    return module


def numbers(module: Base) -> dict[str, Any]:
    return {name: value for name, value in module.state_dict().items() if not value.is_meta and "odd" not in name}


FEW = ("VectorLoss", "TrainableInf", "ResetInStep", "EightBits", "Complex", "csr buffer", "jagged parameter")


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "readback", "act_on"),
    [(kind, "step", "certain") for kind in MAKES]
    + [(kind, "deferred", "certain") for kind in FEW]
    + [(kind, "step", "evidence") for kind in FEW],
)
def test_a_healthy_run_is_left_alone(
    kind: str, readback: Any, act_on: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No error, no intervention, no warning, and the same bits as without the guard."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=5, readback=readback, act_on=act_on)
    with caplog.at_level(logging.INFO, "lightning_nanguard"):
        guarded = run(MAKES[kind], guard)
    assert list(guard.interventions) == []
    # Guards that other tests never used may be collected meanwhile, and say so.
    said = [one.message for one in caplog.records if one.levelno > logging.INFO and one.module != "never_called"]
    assert said == []
    assert differences(numbers(guarded), numbers(run(MAKES[kind], None))) == []


@pytest.mark.parametrize("kind", [kind for kind in MAKES if kind not in ("NoOptimizer", "FrozenFirst")][::2])
def test_a_bad_batch_and_a_lost_weight_are_still_undone(kind: str, tmp_path: Path) -> None:
    """An unusual tensor beside them keeps neither a skip nor a rollback from being made."""
    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=5)
    data = [with_nan(batch) if index == 7 else batch for index, batch in enumerate(batches(count=24))]
    torch.manual_seed(0)
    module = MAKES[kind]()

    def strike(batch: Any, batch_idx: int) -> None:
        if batch_idx == 15:
            with torch.no_grad():
                module.net[0].weight[0, 0] = math.nan

    module.on_train_batch_start = strike  # type: ignore[method-assign]
    trainer_for(None, guard).fit(module, DataLoader(data, batch_size=None))
    assert [one.remedies[0] for one in guard.interventions] == ["skip", "restore"]
    assert bool(module.net[0].weight.isfinite().all())


def test_what_is_not_guarded_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line at INFO: no optimizer, nothing trained yet, elements that are not finite."""
    said = {
        NoOptimizer: "NoOptimizer has no optimizer, so there are no updates to guard",
        FrozenFirst: "no parameter of FrozenFirst is trained yet. The guard begins when one is",
        UnusedNaN: "parameter unused holds NaN or Inf before the first update; these elements are not checked",
    }
    for make, message in said.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning_nanguard"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(make, NaNGuard(dirpath=tmp_path), max_epochs=2)
        assert [message in record.message for record in caplog.records].count(True) == 1


def test_a_first_batch_that_is_bad_does_not_condemn_the_weights(tmp_path: Path) -> None:
    """Where a trained parameter holds −inf, a NaN in the first batch is skipped as ever."""
    data = batches(count=24)
    guard = NaNGuard(dirpath=tmp_path)
    module = run(TrainableInf, guard, [with_nan(data[0]), *data[1:]], max_epochs=1)
    assert [(one.batch_idx, one.remedies) for one in guard.interventions] == [(0, ("skip",))]
    assert module.logits[2] == -math.inf


def test_an_inf_that_becomes_nan_is_corrupt(tmp_path: Path) -> None:
    """What was Inf on purpose may stay so; NaN in its place ends in a rollback."""

    class Lost(TrainableInf):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 15:
                with torch.no_grad():
                    self.logits[2] = math.nan

    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=5)
    module = run(Lost, guard, max_epochs=1)
    assert [(one.remedies, one.cause) for one in guard.interventions] == [(("restore", "redo"), "corrupted_state")]
    assert module.logits[2] == -math.inf


def test_weights_that_no_batch_survives(tmp_path: Path) -> None:
    """Where the first loss of such a weight is bad and its batch is not, the run ends with the weight's name."""

    class Lost(Base):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[0].bias[0] = math.nan

    with pytest.raises(TrainingDivergedError, match=r"parameter net\.0\.bias holds NaN or Inf before the first update"):
        run(Lost, NaNGuard(dirpath=tmp_path))


def test_a_buffer_that_is_inf_on_purpose_may_be_saved_and_resumed(tmp_path: Path) -> None:
    """A checkpoint with such a buffer is written as it is, is not refused, and the resumed run is left alone."""
    guard = NaNGuard(dirpath=tmp_path)
    module = ResetInStep()
    trainer = trainer_for(None, guard, max_epochs=1, limit_train_batches=16)
    trainer.fit(module, DataLoader(batches(count=24), batch_size=None))
    assert bool(module.lowest.isinf().all())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=3)
    resumed = ResetEachEpoch()
    loader = DataLoader(batches(count=24), batch_size=None)
    trainer_for(None, again, max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert [*guard.interventions, *again.interventions] == []


def test_an_average_that_overflows_is_left_alone(tmp_path: Path) -> None:
    """Inf in a buffer of the module's own is its business, whatever its name, as long as every loss is finite."""

    class Normalised(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(3))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 15:
                self.running_var[1] = math.inf

    guard = NaNGuard(dirpath=tmp_path, snapshot_every_n_steps=5)
    module = run(Normalised, guard, max_epochs=1)
    assert guard.interventions == []
    assert math.isinf(module.running_var[1])


def test_statistics_that_are_bad_at_the_start_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No loss of training shows NaN in batch norm's statistics, and the module gives NaN in evaluation mode."""
    module = Task(mlp(norm=True))
    norm = next(layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm1d))
    assert norm.running_mean is not None
    norm.running_mean[0] = math.nan
    guard = NaNGuard(dirpath=tmp_path)
    fit(module, batches(), guard, folder=tmp_path)
    said = [one.message for one in caplog.records if "so that the module gives NaN in evaluation mode" in one.message]
    assert len(said) == 1
    assert "buffer net.1.running_mean holds NaN or Inf before the first update" in said[0]
    assert not len(guard.interventions)


@pytest.mark.parametrize("every", [128, 1000])
def test_statistics_of_data_that_are_not_scaled_are_no_fault(every: int, tmp_path: Path) -> None:
    """Running statistics far above their initial values are usual, also if the only older snapshot is the first one."""

    def task() -> Task:
        torch.manual_seed(0)
        return Task(nn.Sequential(nn.BatchNorm1d(6), mlp()), lambda p: Adam(p, lr=1e-3))

    data = [(5e3 * x, y) for x, y in batches(count=260)]
    bare = fit(task(), data, folder=tmp_path / "bare")
    guard = NaNGuard(act_on="evidence", snapshot_every_n_steps=every)
    guarded = fit(task(), data, guard, folder=tmp_path / "guarded")
    assert differences(state_of(bare), state_of(guarded)) == []
    assert guard.interventions == []
