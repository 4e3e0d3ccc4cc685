"""Beside Lightning's own callbacks and a user's: no harm in healthy runs, and none of them is poisoned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Batch,
    Run,
    Task,
    batches,
    copied,
    differences,
    fit,
    learner_of,
    mlp,
    non_finite,
    state_of,
    task,
    with_bad,
    words,
)
from tests.modules import Diverge, NaNWeight, make

HAS_AVERAGING = hasattr(stock, "WeightAveraging")
averaging = pytest.mark.skipif(not HAS_AVERAGING, reason="this Lightning has no WeightAveraging")

pytestmark = [
    # Lightning's own advice and notes about what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.usefixtures("own_folder"),
]

BAD_BATCH = 13
BAD_WEIGHT = 18
PER_EPOCH = 10
EPOCHS = 3


class CopyEMA(Callback):
    """A user's moving average that keeps a deep copy of the module."""

    def __init__(self) -> None:
        self.copy: nn.Module | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.copy = copy.deepcopy(pl_module.net)

    def tensors(self) -> dict[str, Tensor]:
        assert self.copy is not None
        return self.copy.state_dict()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for mine, theirs in zip(self.tensors().values(), pl_module.net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.mul_(0.9).add_(theirs, alpha=0.1)


class WholeCopyEMA(CopyEMA):
    """The same with a deep copy of the LightningModule."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer_of_it, pl_module._trainer = pl_module._trainer, None
        self.copy = copy.deepcopy(pl_module)
        pl_module._trainer = trainer_of_it

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for mine, theirs in zip(self.tensors().values(), pl_module.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.mul_(0.9).add_(theirs, alpha=0.1)


class DictEMA(Callback):
    """A user's moving average in a dictionary whose tensors are replaced with every update."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.average[name] = 0.9 * self.average[name] + 0.1 * value.detach()


class TrainableEMA(Callback):
    """The same, of the parameters alone."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for name, value in pl_module.named_parameters():
            self.average[name].lerp_(value.detach(), 0.1)


EMAS: dict[str, Callable[[], Any]] = {
    "deep copy of a part": CopyEMA,
    "deep copy": WholeCopyEMA,
    "dictionary": DictEMA,
    "parameters": TrainableEMA,
}


def averages_of(callback: Any) -> dict[str, Tensor]:
    if hasattr(callback, "tensors"):
        return dict(callback.tensors())
    model = callback._average_model
    return {} if model is None else dict(model.state_dict())


def companions(folder: Path) -> dict[str, Callable[[], list[Callback]]]:
    """Every companion by name, new at each call."""
    known: dict[str, Callable[[], list[Callback]]] = {
        "early stopping": lambda: [EarlyStopping("val_loss", patience=50, check_finite=True)],
        "top k": lambda: [ModelCheckpoint(folder / "top", monitor="val_loss", save_top_k=2, save_last=True)],
        "every step": lambda: [ModelCheckpoint(folder / "steps", every_n_train_steps=1, save_top_k=-1)],
        "rate monitor": lambda: [LearningRateMonitor("step")],
        "timer": lambda: [Timer("00:01:00:00")],
        "swa": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)],
        **{name: (lambda make=make: [make()]) for name, make in EMAS.items()},
    }
    if HAS_AVERAGING:
        known["weight averaging"] = lambda: [stock.WeightAveraging()]
        known["ema averaging"] = lambda: [stock.EMAWeightAveraging(decay=0.9)]
    return known


COMPANIONS = sorted(companions(Path()))
BESIDE_A_LOST_WEIGHT = [
    name
    for name in COMPANIONS
    if name != "every step"  # has a test of its own below
]


def train(
    companions: list[Callback],
    guard: NaNGuard | None,
    *,
    data: list[Batch] | None = None,
    faults: list[Callback] | None = None,
    first: bool = False,
    norm: bool = False,
    **options: Any,
) -> Run:
    """Train with the guard first or last in the list."""
    listed = [*(faults or []), *companions]
    if guard is not None:
        listed = [guard, *listed] if first else [*listed, guard]
    module = task("norm" if norm else "mlp", lambda p: SGD(p, lr=0.05, momentum=0.9), lambda o: StepLR(o, 7, 0.5))
    if any(isinstance(c, StochasticWeightAveraging) for c in companions):
        module.make_scheduler = None
    options = {
        "max_epochs": EPOCHS,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in listed),
        **options,
    }
    return fit(module, data or batches(count=PER_EPOCH), callbacks=listed, val=batches(count=2, seed=5), **options)


def saved_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ckpt"))


# ---------------------------------------------------------------------------------------------------- no harm


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", COMPANIONS)
def test_no_harm(name: str, first: bool, tmp_path: Path) -> None:
    """A healthy run with a companion has the same bits with and without the guard, which stands first of all."""
    known = {}
    for which in ("bare", "guarded"):
        others = companions(tmp_path / which)[name]()
        guard = NaNGuard(snapshot_every_n_steps=2) if which == "guarded" else None
        run = train(others, guard, first=first, norm=True)
        files = {file.name: torch.load(file, weights_only=True) for file in saved_in(tmp_path / which)}
        for content in files.values():
            content["callbacks"] = {k: v for k, v in content["callbacks"].items() if k.startswith("EarlyStopping")}
        averages = [copied(averages_of(c)) for c in others if hasattr(c, "tensors") or hasattr(c, "_average_model")]
        known[which] = (state_of(run), averages, files)
        if guard is not None:
            assert run.trainer.callbacks[0] is guard
            assert list(guard.interventions) == []
    assert differences(known["bare"][0], known["guarded"][0]) == []
    assert differences(known["bare"][1], known["guarded"][1]) == []
    assert differences(known["bare"][2], known["guarded"][2]) == []


# ---------------------------------------------------------------------------------------------------- after a fault


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", COMPANIONS)
def test_nothing_is_poisoned_by_a_batch(name: str, first: bool, tmp_path: Path) -> None:
    """After a NaN batch no companion holds NaN, stops the run, or has written NaN to a file."""
    data = with_bad(BAD_BATCH - PER_EPOCH, count=PER_EPOCH)
    others = companions(tmp_path)[name]()
    guard = NaNGuard()
    run = train(others, guard, data=data, first=first)
    assert words(guard) == [("skip",)] * EPOCHS
    assert run.trainer.current_epoch == EPOCHS
    assert_clean(run, others, tmp_path)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", BESIDE_A_LOST_WEIGHT)
def test_nothing_is_poisoned_by_a_weight(name: str, first: bool, tmp_path: Path) -> None:
    """After a weight was lost no companion holds NaN, stops the run, or has written NaN to a file."""
    others = companions(tmp_path)[name]()
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train(others, guard, faults=[NaNWeight(BAD_WEIGHT)], first=first)
    assert words(guard) == [("restore",)]
    assert_clean(run, others, tmp_path)


def assert_clean(run: Run, others: list[Callback], folder: Path) -> None:
    assert non_finite(learner_of(run.trainer, run.module)) == []
    for companion in others:
        if hasattr(companion, "tensors") or hasattr(companion, "_average_model"):
            assert non_finite(averages_of(companion)) == []
        if isinstance(companion, ModelCheckpoint):
            assert saved_in(folder) != []
            if companion.monitor is not None:
                assert companion.best_model_score is not None
                assert math.isfinite(float(companion.best_model_score))
    for file in saved_in(folder):
        content = torch.load(file, weights_only=True)
        assert non_finite({k: content[k] for k in ("state_dict", "optimizer_states")}) == [], file.name


def test_no_file_right_after_a_weight_was_lost(tmp_path: Path) -> None:
    """A checkpoint written between the loss of a weight and the next batch holds the last good state instead."""
    others = companions(tmp_path)["every step"]()
    run = train(others, NaNGuard(snapshot_every_n_steps=2), faults=[NaNWeight(BAD_WEIGHT)])
    assert_clean(run, others, tmp_path)


@pytest.mark.parametrize("name", sorted(EMAS))
def test_averages_are_rewound_bitwise(name: str) -> None:
    """A restore takes a user's average back to where it stood when the snapshot was taken."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    ema = EMAS[name]()
    before: dict[int, Any] = {}
    restored: dict[str, Any] = {}

    class Look(Callback):
        """Listed before the average and after the guard: sees what a snapshot and a restore see."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            before[trainer.global_step] = copied(averages_of(ema))
            if guard.interventions and not restored:
                restored.update(copied(averages_of(ema)))

    train([Look(), ema], guard, faults=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore",)]
    step = guard.interventions[0].snapshot_step
    assert step is not None
    if step > 0:
        assert differences(before[step], restored) == []


@averaging
def test_weight_averaging_is_rewound_and_goes_on() -> None:
    """Lightning's own average is finite after a restore, and goes on following the weights."""
    average = stock.EMAWeightAveraging(decay=0.5)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train([average], guard, faults=[NaNWeight(5)])
    assert words(guard) == [("restore",)]
    # On train end the average is what the module holds.
    assert non_finite(dict(run.module.named_parameters())) == []


@averaging
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_snapshots_hold_no_average_swapped_in_for_validation(first: bool) -> None:
    """A validation that swaps the average in does not bring it into what a restore puts back."""
    average = stock.WeightAveraging()
    guard = NaNGuard(snapshot_every_n_steps=1)
    after: dict[int, Any] = {}
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if guard.interventions and not seen:
                seen.append(copied(dict(pl_module.named_parameters())))
            after[trainer.global_step] = copied(dict(pl_module.named_parameters()))

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            # The validation loss of a lost weight is NaN, and the guard looks into it at once.
            if guard.interventions and not seen:
                seen.append(copied(dict(pl_module.named_parameters())))

    train([Look(), average], guard, faults=[NaNWeight(BAD_WEIGHT)], first=first, val_check_interval=1)
    step = guard.interventions[0].snapshot_step
    assert step is not None
    assert differences(after[step], seen[0]) == []


@pytest.mark.parametrize("after", [10, 11, 15, 20, 21, 25])
def test_swa_with_a_weight_lost(after: int) -> None:
    """A weight lost before, at, or after the start of SWA reaches neither the average nor the weights at the end."""
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train([swa], guard, faults=[NaNWeight(after)], norm=True)
    assert [i.remedies for i in guard.interventions] == [("restore",)]
    assert non_finite(learner_of(run.trainer, run.module)) == []
    assert non_finite(averages_of(swa)) == []


def test_early_stopping_is_not_misled() -> None:
    """A NaN batch does not end a run whose EarlyStopping checks the epoch's training loss for being finite."""
    data = with_bad(4, count=PER_EPOCH)
    guard = NaNGuard()
    run = train([EarlyStopping("loss_epoch", patience=50, check_finite=True)], guard, data=data)
    assert run.trainer.current_epoch == EPOCHS
    assert math.isfinite(float(run.trainer.callback_metrics["loss_epoch"]))


def test_top_k_by_training_loss(tmp_path: Path) -> None:
    """A ModelCheckpoint that follows the training loss never calls a NaN epoch its best."""
    data = with_bad(4, count=PER_EPOCH)
    top = ModelCheckpoint(tmp_path, monitor="loss_epoch", save_top_k=1, mode="min")
    run = train([top], NaNGuard(), data=data)
    assert math.isfinite(float(top.best_model_score))
    assert_clean(run, [top], tmp_path)


def test_rate_monitor_shows_the_effective_rate() -> None:
    """LearningRateMonitor logs the rate that steps really use after a cut, whichever of the two is listed first."""
    for first in (True, False):
        guard = NaNGuard(snapshot_every_n_steps=2)
        monitor = LearningRateMonitor("step")
        faults = [Diverge(6, 9)]
        run = train([monitor], guard, faults=faults, first=first)
        if guard.lr_multiplier == 1.0:
            pytest.fail(f"no cut was made: {list(guard.interventions)}")
        shown = [row["lr-SGD"] for _, row in run.logger.rows if "lr-SGD" in row]
        scheduled = [0.05 * 0.5 ** (step // 7) for step in range(len(shown))]
        assert shown[5] == pytest.approx(scheduled[5])
        assert shown[-1] == pytest.approx(scheduled[-1] * guard.lr_multiplier)
        # What the optimizer and the checkpoint hold is the schedule's own rate.
        assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5 ** (30 // 7))


# ---------------------------------------------------------------------------------------------------- tuners


class Tunable(Task):
    """A task whose batch size and rate a tuner may set."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.lr = 0.01
        self.batch_size = 4
        x, y = batches(count=1, size=96)[0]
        self.dataset = TensorDataset(x, y)
        self.make_optimizer = lambda parameters: SGD(parameters, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)


@pytest.mark.parametrize("tuner", ["batch size", "learning rate"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_tuners(tuner: str, first: bool, tmp_path: Path) -> None:
    """A tuner comes to the same result with the guard beside it, and the guard stands right behind it."""
    results = {}
    for guarded in (False, True):
        torch.manual_seed(0)
        guard = NaNGuard()
        finder = (
            BatchSizeFinder(mode="power", steps_per_trial=1, init_val=4, max_trials=3)
            if tuner == "batch size"
            else LearningRateFinder(num_training_steps=20)
        )
        listed: list[Callback] = [finder]
        if guarded:
            listed = [guard, finder] if first else [finder, guard]
        module = Tunable()
        trainer = Trainer(
            callbacks=listed,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module)
        if guarded:
            assert trainer.callbacks.index(guard) == 1
            assert trainer.callbacks[0] is finder
            assert list(guard.interventions) == []
        results[guarded] = (module.batch_size, module.lr, copied(dict(module.named_parameters())))
    assert differences(results[False], results[True]) == []


# ---------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_order(first: bool, tmp_path: Path) -> None:
    """The guard comes before every other callback, and the rest keep their order."""
    others: list[Callback] = [EarlyStopping("val_loss"), LearningRateMonitor("step"), DictEMA(), Timer("00:01:00:00")]
    guard = NaNGuard()
    run = train([*others, ModelCheckpoint(tmp_path)], guard, first=first, max_epochs=1)
    listed = run.trainer.callbacks
    assert listed[0] is guard
    assert [c for c in listed if c in others] == others
    assert isinstance(listed[-1], ModelCheckpoint)
    assert listed.count(guard) == 1


def test_two_epochs_of_everything_at_once(tmp_path: Path) -> None:
    """All companions together live through a bad batch and a lost weight."""
    known = companions(tmp_path)
    others = [c for name in ("early stopping", "top k", "rate monitor", "timer", "dictionary") for c in known[name]()]
    data = with_bad(4, count=PER_EPOCH)
    guard = NaNGuard(snapshot_every_n_steps=2)
    run = train(others, guard, data=data, faults=[NaNWeight(BAD_WEIGHT)])
    assert [w for w in words(guard) if w != ("skip",)] == [("restore",)]
    assert words(guard).count(("skip",)) == EPOCHS
    assert_clean(run, others, tmp_path)
    assert isinstance(run.module, type(make()()))
