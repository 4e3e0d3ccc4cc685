"""A skipped batch leaves nothing behind: the run equals, bit for bit, one whose data never held it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, Metric, MetricCollection

from lightning_nanguard import NaNGuard
from lightning_nanguard.thresholds import BatchesThresholds, Thresholds
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from tests.helpers import (
    Batch,
    Counting,
    FaultAt,
    Lookahead,
    Looked,
    Run,
    Task,
    TwoOptimizers,
    batches,
    copied,
    data_for,
    differences,
    fit,
    learner_of,
    mlp,
    task,
    with_nan,
)

Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.005, momentum=0.5),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "averaged": lambda p: optim.ASGD(p, lr=0.05, t0=3),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "counting": lambda p: Counting(p, lr=0.05),
    "lookahead": lambda p: Lookahead(p, lr=0.05, momentum=0.9),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.5, max_iter=4, history_size=5),
}


def left_behind(run: Run) -> dict[str, Any]:
    """What must be as if the batch had never been seen: the learner, and the epoch's means."""
    logged = run.trainer.callback_metrics.items()
    means = {key: value for key, value in logged if not key.endswith("_step") and not key.startswith("nanguard")}
    return {**learner_of(run.trainer, run.module), "means": means}


def without(data: Sequence[Batch], *left_out: int) -> list[Batch]:
    return [batch for index, batch in enumerate(data) if index not in left_out]


def only(guard: NaNGuard) -> Any:
    """The one intervention there is, a skip that left the learning rate alone."""
    assert [i.remedies for i in guard.interventions] == [("skip",)]
    assert guard.lr_multiplier == 1.0
    found = guard.interventions[0]
    assert found.lr_before == found.lr_after
    assert found.snapshot_step is None
    assert found.applied
    return found


# Every fault at every position for the optimizers that are hard to keep still, a few for the others.
HARD = ["adamw", "counting", "lookahead", "lbfgs"]
MEETINGS = [
    (optimizer, kind, bad)
    for optimizer in OPTIMIZERS
    for kind in ("input", "target", "loss", "gradient")
    for bad in (0, 7, 11)
    if optimizer in HARD or (kind, bad) in (("input", 7), ("gradient", 0), ("loss", 11))
]


@cache
def never(optimizer: str, bad: int) -> dict[str, Any]:
    """What a run leaves behind whose data never held the batch, whatever was wrong with it."""
    run = fit(task("norm", OPTIMIZERS[optimizer], metric=True), without(data_for("norm"), bad))
    assert run.trainer.global_step == 11
    return left_behind(run)


@pytest.mark.parametrize(("optimizer", "kind", "bad"), MEETINGS)
def test_one_bad_batch(optimizer: str, kind: str, bad: int, tmp_path: Path) -> None:
    """Weights, moments, step counts, batch-norm statistics, torchmetrics objects and the epoch's means are those of
    data without the batch, whether it is the first, one in the middle, or the last."""
    make = OPTIMIZERS[optimizer]
    data = data_for("norm")
    guard = NaNGuard(snapshot_every_n_steps=3)
    fault = FaultAt(kind, math.nan, bad)
    guarded = fit(task("norm", make, metric=True), data, guard, folder=tmp_path, callbacks=[fault])
    assert differences(left_behind(guarded), never(optimizer, bad)) == []
    assert guarded.trainer.global_step == 12, "the clock goes on"
    found = only(guard)
    assert found.batch_idx == bad
    assert found.epoch == 0
    assert found.fault == ("non_finite_gradient" if kind == "gradient" else "non_finite_loss")
    assert found.place == ("gradient of net.0.weight" if kind == "gradient" else "loss")
    known = {"input": "non_finite_input", "target": "non_finite_input", "loss": "unknown_operation"}
    assert found.cause == known.get(kind, "changed_gradient")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"precision": "64-true"}),
        ("norm", {"precision": "bf16-mixed"}),
        ("norm", {"gradient_clip_val": 0.1}),
        ("mlp", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        ("gru", {}),
        ("mlp", {"enable_progress_bar": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [0, 7])
def test_other_ways_to_train(model: str, options: dict[str, Any], bad: int, tmp_path: Path) -> None:
    """The skip is as clean in every precision, with clipping, and for a recurrent model."""
    data = data_for(model)
    guard = NaNGuard(snapshot_every_n_steps=3)
    with_fault = [with_nan(batch) if index == bad else batch for index, batch in enumerate(data)]
    guarded = fit(task(model, metric=True), with_fault, guard, folder=tmp_path, **options)
    never = fit(task(model, metric=True), without(data, bad), folder=tmp_path, **options)
    assert differences(left_behind(guarded), left_behind(never)) == []
    assert only(guard).batch_idx == bad


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "adamw fused"])
def test_fp16(optimizer: str, tmp_path: Path) -> None:
    """With a GradScaler a non-finite loss is skipped as cleanly; only the scale may have been halved for it."""
    make, data = OPTIMIZERS[optimizer], data_for("norm")
    guard = NaNGuard(snapshot_every_n_steps=3)
    with_fault = [with_nan(batch) if index == 7 else batch for index, batch in enumerate(data)]
    options = {"folder": tmp_path, "precision": "16-mixed"}
    guarded = fit(task("norm", make, metric=True), with_fault, guard, **options)
    never = fit(task("norm", make, metric=True), without(data, 7), **options)
    assert only(guard).batch_idx == 7
    one, other = left_behind(guarded), left_behind(never)
    assert differences(one["metrics"], other["metrics"]) == []
    # Another scale rounds small fp16 gradients otherwise.
    for name, value in other["parameters"].items():
        torch.testing.assert_close(one["parameters"][name], value, rtol=1e-3, atol=1e-3)
    steps = [state["step"].item() for state in one["optimizers"][0]["state"].values() if "step" in state]
    assert set(steps) <= {11.0}


FUSED: dict[str, Make] = {
    "adamw fused": OPTIMIZERS["adamw fused"],
    "sgd fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.05, fused=True),
}


@cache
def never_fused(optimizer: str) -> dict[str, Any]:
    return left_behind(fit(task("mlp", FUSED[optimizer]), without(data_for("mlp"), 7)))


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_deferred_readback_with_a_fused_optimizer(kind: str, optimizer: str, tmp_path: Path) -> None:
    """In deferred readback the device itself keeps the update from weights and moments."""
    data = data_for("mlp")
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred")
    fault = FaultAt(kind, math.nan, 7)
    guarded = fit(task("mlp", FUSED[optimizer]), data, guard, folder=tmp_path, callbacks=[fault])
    only(guard)
    one, other = left_behind(guarded), never_fused(optimizer)
    assert differences(one["parameters"], other["parameters"]) == []
    assert differences(one["optimizers"], other["optimizers"]) == []


class SpoilsOneRow(Callback):
    """Makes the gradient of one row of the embedding non-finite, dense or sparse, at one batch."""

    def __init__(self, value: float, batch_idx: int) -> None:
        self.value = value
        self.at = batch_idx
        self.batch_idx = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.embedding.weight.register_hook(self._spoiled)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def _spoiled(self, gradient: Tensor) -> Tensor:
        if self.batch_idx == self.at:
            gradient = gradient.clone()
            (gradient._values() if gradient.is_sparse else gradient)[3, 0] = self.value
        return gradient


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_one_row_of_an_embedding(sparse: bool, value: float, tmp_path: Path) -> None:
    """One bad row among finite ones, under a finite loss, is found and named, dense or sparse."""

    def sgd(parameters: list[nn.Parameter]) -> Optimizer:
        return optim.SGD(parameters, lr=0.05, momentum=0.9)

    ended = []
    data = batches("tokens")
    for left_out in (False, True):
        torch.manual_seed(0)
        module = Task(Looked(sparse), sgd, metric=MeanSquaredError())
        guard = None if left_out else NaNGuard(snapshot_every_n_steps=3)
        callbacks = [] if left_out else [SpoilsOneRow(value, 5)]
        seen = without(data, 5) if left_out else data
        ended.append(left_behind(fit(module, seen, guard, folder=tmp_path, callbacks=callbacks)))
        if guard is not None:
            found = only(guard)
            assert (found.fault, found.place) == ("non_finite_gradient", "gradient of net.embedding.weight")
            assert found.batch_idx == 5
    assert differences(*ended) == []


def with_nan_in(kind: Callable[..., Metric]) -> Metric:
    """A metric that takes NaN like any other number."""
    try:
        return kind(nan_strategy="disable")
    except ValueError:
        pytest.skip("the metrics of this torchmetrics let no NaN in")


class Measured(Task):
    """Every kind of torchmetrics object, updated and logged in every way."""

    def __init__(self) -> None:
        super().__init__(mlp(norm=True))
        self.mean = with_nan_in(MeanMetric)
        self.seen = with_nan_in(CatMetric)
        self.many = MetricCollection({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)}, prefix="x_")
        self.listed = nn.ModuleList([MeanSquaredError()])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch, "loss")
        prediction = self.net(batch[0]).detach()
        self.mean.update(loss.detach())
        self.seen(loss.detach())
        self.many.update(prediction, batch[1])
        self.listed[0](prediction, batch[1])
        self.log_dict(self.many, on_step=False, on_epoch=True)
        self.log("listed", self.listed[0], on_step=True, on_epoch=True)
        for reduce in ("mean", "max", "min", "sum"):
            self.log(f"loss_{reduce}", loss, on_step=False, on_epoch=True, reduce_fx=reduce, batch_size=len(batch[1]))
        return loss


@pytest.mark.parametrize("bad", [0, 7, 11])
def test_metrics_of_every_kind(bad: int, tmp_path: Path) -> None:
    """Means, lists, collections with shared states and every reduction behind ``self.log`` forget the batch, in the
    epoch it was met and in the next."""
    ended = []
    data = data_for("norm")
    for left_out in (False, True):
        torch.manual_seed(0)
        guard = None if left_out else NaNGuard(snapshot_every_n_steps=3)
        callbacks = [] if left_out else [FaultAt("input", math.nan, [bad, bad + 12])]
        seen = without(data, bad) if left_out else data
        run = fit(Measured(), seen, guard, folder=tmp_path, callbacks=callbacks, max_epochs=2)
        at_epoch_end = [row for _, row in run.logger.rows if "loss_max" in row]
        ended.append(
            {**left_behind(run), "epochs": [{k: v for k, v in r.items() if k != "epoch"} for r in at_epoch_end]}
        )
        if guard is not None:
            assert [(i.epoch, i.batch_idx, i.remedies) for i in guard.interventions] == [
                (0, bad, ("skip",)),
                (1, bad, ("skip",)),
            ]
    assert len(ended[0]["epochs"]) == 2
    assert differences(*ended) == []


KEEPS_NO_WINDOW = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(window_bytes=0)))


@cache
def never_accumulated(window: int) -> dict[str, Any]:
    data = without(data_for("norm"), *range(3 * window, 3 * window + 3))
    return left_behind(fit(task("norm", metric=True), data, accumulate_grad_batches=3))


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_accumulation(kind: str, place: int, window: int, tmp_path: Path) -> None:
    """Where its batches are not kept, one bad micro-batch costs its whole window, wherever it stands, and no more."""
    data = data_for("norm")
    bad = 3 * window + place
    guard = NaNGuard(snapshot_every_n_steps=2, thresholds=KEEPS_NO_WINDOW)
    options: dict[str, Any] = {"folder": tmp_path, "accumulate_grad_batches": 3}
    fault = FaultAt(kind, math.nan, bad)
    guarded = fit(task("norm", metric=True), data, guard, callbacks=[fault], **options)
    assert differences(left_behind(guarded), never_accumulated(window)) == []
    found = only(guard)
    assert 3 * window + place <= found.batch_idx <= 3 * window + 2
    assert guarded.trainer.global_step == 4


def test_window_cut_short_by_the_epochs_end(tmp_path: Path) -> None:
    """The last window of an epoch may hold fewer micro-batches; a bad one costs that window at most."""
    data = data_for("norm", 11)
    guard = NaNGuard(snapshot_every_n_steps=2, thresholds=KEEPS_NO_WINDOW)
    options: dict[str, Any] = {"folder": tmp_path, "accumulate_grad_batches": 3}
    guarded = fit(task("norm", metric=True), data, guard, callbacks=[FaultAt("input", math.nan, 10)], **options)
    never = fit(task("norm", metric=True), without(data, 9, 10), **options)
    assert differences(left_behind(guarded), left_behind(never)) == []
    assert only(guard).batch_idx == 10


class SpoilsStep(Callback):
    """Makes a gradient of one of the two optimizers' parts non-finite, under finite losses."""

    def __init__(self, optimizer: int, batch_idx: int, value: float = math.nan) -> None:
        self.names = ["net.0.weight", "net.2.weight"]
        self.optimizer, self.at, self.value = optimizer, batch_idx, value
        self.batch_idx = -1
        self.backward = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch_idx, self.backward = batch_idx, 0

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.batch_idx == self.at and self.backward == self.optimizer:
            grad = dict(pl_module.named_parameters())[self.names[self.optimizer]].grad
            assert grad is not None
            grad[0, 0] = self.value
        self.backward += 1


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "adamw fused", "counting"])
@pytest.mark.parametrize("concerned", [0, 1])
def test_manual_optimization(concerned: int, optimizer: str, tmp_path: Path) -> None:
    """Under manual optimization only the step of the optimizer with the bad gradient is skipped."""
    make, data = OPTIMIZERS[optimizer], data_for("manual")
    guard = NaNGuard(snapshot_every_n_steps=3)
    spoil = SpoilsStep(concerned, 7)
    guarded = fit(task("manual", make), data, guard, folder=tmp_path, callbacks=[spoil])
    expected = task("manual", make)
    assert isinstance(expected, TwoOptimizers)
    expected.leave_out = {(concerned, 7)}
    never = fit(expected, data, folder=tmp_path)
    found = only(guard)
    assert (found.batch_idx, found.place) == (7, f"gradient of {spoil.names[concerned]}")
    assert differences(learner_of(guarded.trainer, guarded.module), learner_of(never.trainer, never.module)) == []
    assert guarded.trainer.global_step == 24


@pytest.mark.parametrize("kind", ["input", "target", "loss"])
def test_manual_optimization_with_a_bad_batch(kind: str, tmp_path: Path) -> None:
    """A batch that is bad for both optimizers is skipped by both, and leaves nothing behind."""
    data = data_for("manual")
    guard = NaNGuard(snapshot_every_n_steps=3)
    guarded = fit(task("manual"), data, guard, folder=tmp_path, callbacks=[FaultAt(kind, math.nan, 7)])
    never = fit(task("manual"), without(data, 7), folder=tmp_path)
    assert {i.remedies for i in guard.interventions} == {("skip",)}
    assert {i.batch_idx for i in guard.interventions} == {7}
    assert differences(left_behind(guarded), left_behind(never)) == []


def test_several_bad_batches(tmp_path: Path) -> None:
    """Bad batches alone and in a row are each skipped, on record one by one, and leave nothing behind together."""
    data = data_for("norm", 30)
    bad = [0, 4, 5, 6, 20, 22, 29]
    guard = NaNGuard(snapshot_every_n_steps=3)
    guarded = fit(task("norm", metric=True), data, guard, folder=tmp_path, callbacks=[FaultAt("input", math.nan, bad)])
    never = fit(task("norm", metric=True), without(data, *bad), folder=tmp_path)
    assert [i.batch_idx for i in guard.interventions] == bad
    assert [i.remedies for i in guard.interventions] == [("skip",)] * len(bad)
    assert differences(left_behind(guarded), left_behind(never)) == []


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_batch_that_is_refused(accumulated: int, tmp_path: Path) -> None:
    """Where ``on_train_batch_start`` gives -1, which ends the epoch, nothing is left open; a bad batch at the beginning
    of the next epoch is undone to there, and not to the epoch before."""

    class Sees(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            fit_of_guard = guard._fit
            assert fit_of_guard is not None
            in_window.append(fit_of_guard.guard.in_window)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch:
                module.metric.reset()  # behind what Lightning does on its own
                module.metric.update(torch.ones(3, 1), torch.zeros(3, 1))
                seen.append(copied(learner_of(trainer, module)["metrics"]))

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.current_epoch and trainer.fit_loop.batch_idx == accumulated - 1:
                seen.append(copied(learner_of(trainer, module)["metrics"]))

    guard = NaNGuard(snapshot_every_n_steps=3)
    in_window: list[bool] = []
    seen: list[Any] = []
    module = task("norm", metric=True)
    refused = 5  # within a window, where there are windows
    module.on_train_batch_start = lambda batch, index: -1 if index == refused and not module.current_epoch else None
    bad = FaultAt("input", math.nan, range(refused + 1, refused + 1 + accumulated))
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated, "max_epochs": 2, "callbacks": [Sees(), bad]}
    fit(module, data_for("norm"), guard, folder=tmp_path, **options)
    assert in_window == [False, False]
    assert {i.batch_idx for i in guard.interventions} <= set(range(accumulated))
    assert guard.interventions
    assert differences(seen[0], seen[1]) == []


def test_global_step_on_record_is_the_trainers_after_the_batch(tmp_path: Path) -> None:
    """A record is written at the end of its batch, when the clock has already gone on."""
    guard = NaNGuard()
    fit(task("mlp"), data_for("mlp"), guard, folder=tmp_path, callbacks=[FaultAt("loss", math.nan, 4)])
    assert only(guard).global_step == 5


class Grown(Task):
    """A large buffer that changes once only, in the bad batch: too large to be copied before every batch."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.register_buffer("memory", torch.zeros(1 << 15))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 7:
            self.memory += batch[0].mean()
        return self.loss(batch, "loss")


def test_a_large_buffer_that_changes_for_the_first_time(tmp_path: Path) -> None:
    """A buffer that only the bad batch wrote to is as it was before."""
    torch.manual_seed(0)
    guard = NaNGuard(snapshot_every_n_steps=3)
    run = fit(Grown(), data_for("mlp"), guard, folder=tmp_path, callbacks=[FaultAt("input", math.nan, 7)])
    assert bool(torch.isfinite(run.module.memory).all()), "NaN stays in the buffer"
    assert not run.module.memory.any()
