"""Steps that are made again: a transient fault costs nothing, a bad micro-batch costs itself."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from lightning_nanguard import NaNGuard
from tests.helpers import OUTPUTS, Batch, batches, differences, fit, learner_of, with_nan, words
from tests.modules import Diverge
from tests.trainer.faulty_steps import NAN, Fault, Faulty, Sees, left_behind, train

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=0.01),
    "fused": partial(AdamW, lr=0.01, fused=True),
    "momentum": partial(SGD, lr=0.05, momentum=0.9),
    "lbfgs": partial(LBFGS, lr=0.1, max_iter=3, history_size=3),
}
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "fused": {},
    "momentum": {"gradient_clip_val": 0.5},
    "lbfgs": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "fp16": {"precision": "16-mixed"},
    "bf16": {"precision": "bf16-mixed"},
}


@cache
def twin(way: str, folder: Path) -> dict[str, Any]:
    """What is left of the run without a fault and without a guard."""
    return train(None, folder, optimizer=OPTIMIZERS.get(way), **WAYS[way])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs to compare with lie."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("kind", ["loss", "activation", "gradient", "raises", "backward raises"])
@pytest.mark.parametrize("way", WAYS)
def test_a_fault_that_is_gone_costs_nothing(way: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """Weights, buffers, metrics, means, logged values, attributes, random streams, progress, and what callbacks saw are
    bit for bit those of a run without the fault: in the first step, early, and in the second epoch."""
    if way == "fp16" and kind in ("gradient", "backward raises"):
        pytest.skip("a gradient that is not finite is the scaler's business, and its losses are scaled")
    fault = Fault(kind, (4, 14) if "raises" in kind else (0, 4, 14))
    guard = NaNGuard(snapshot_every_n_steps=3)
    left, _ = train(fault, tmp_path, guard=guard, optimizer=OPTIMIZERS.get(way), **WAYS[way])
    assert fault.hits == len(fault.left)
    assert set(words(guard)) == {("redo",)}
    assert len(guard.interventions) == fault.hits
    assert {one.cause for one in guard.interventions} == {"transient"}
    # Within a window of accumulation a gradient is looked at when callbacks have seen the loss of the step before.
    assert differences(left, twin(way, folder)) == []


def test_the_callbacks_stay_in_their_list(tmp_path: Path) -> None:
    """While a step is made again, the thread of a progress bar and ``training_step`` find every callback there is."""

    class Looks(Faulty):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            found.append((list(self.trainer.callbacks), self.trainer.progress_bar_callback))
            return super().training_step(batch, batch_idx)

    found: list[tuple[list[Callback], Any]] = []
    module = Looks(Fault("gradient", (3,)))
    run = fit(module, batches(), NaNGuard(), folder=tmp_path, callbacks=[Sees()], enable_progress_bar=True)
    assert len(found) == len(batches()) + 1
    assert all(one == found[0] for one in found)
    assert found[0][1] is run.trainer.progress_bar_callback is not None
    assert not {"on_before_backward", "on_after_backward"} & vars(found[0][1]).keys()


def test_what_is_recorded_of_it(tmp_path: Path) -> None:
    """The place, how often, and from the third time on the advice to test the device."""
    guard = NaNGuard()
    train(Fault("gradient", (3, 6, 9)), tmp_path, guard=guard)
    found = [one.finding for one in guard.interventions]
    assert [one.place for one in guard.interventions] == ["gradient of net.0.weight"] * 3
    assert [one.evidence["times"] for one in found if one is not None] == [1.0, 2.0, 3.0]
    assert ["test the device" in one.suggestion for one in found if one is not None] == [False, False, True]
    assert [(one.global_step, one.batch_idx) for one in guard.interventions] == [(4, 3), (7, 6), (10, 9)]
    assert guard.non_finite_rate == 0.0


def test_a_flag_of_the_module_that_comes_back(tmp_path: Path) -> None:
    """A fault that hangs on an attribute which the step changes is gone without that attribute put back, and counters
    stand as after one step."""

    class Flagged(Faulty):
        fresh = True

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.steps == 5 and self.fresh:
                self.fresh = False
                return loss * NAN
            return loss

    ends = []
    for guard, fresh in ((None, False), (NaNGuard(), True)):
        sees, module = Sees(), Flagged(None)
        module.fresh = fresh
        run = fit(module, batches(), guard, folder=tmp_path, callbacks=[sees])
        ends.append(left_behind(run, sees))
        if guard is not None:
            assert words(guard) == [("redo",)]
            finding = guard.interventions[0].finding
            assert finding is not None
            assert "depends on what the step itself changes: look at how" in finding.suggestion
            assert "fresh" in finding.suggestion
    assert differences(*ends) == []


def test_observing_changes_nothing(tmp_path: Path, folder: Path) -> None:
    """With ``observe=True`` no step is made again."""
    fault = Fault("loss", (4,))
    guard = NaNGuard(observe=True)
    _, run = train(fault, tmp_path, guard=guard)
    assert run.module.steps == 24  # type: ignore[attr-defined]
    assert ("redo",) not in words(guard)


@pytest.mark.parametrize("observe", [False, True])
def test_nothing_is_remembered_of_a_step_where_nothing_is_undone(observe: bool, tmp_path: Path) -> None:
    """With ``observe=True`` what a step replaces among the module's attributes is let go of at once."""

    class Replaces(Faulty):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            before = None if self.carried is None else weakref.ref(self.carried)
            loss = super().training_step(batch, batch_idx).detach()
            if before is not None:
                kept.append(before() is not None)
            return loss + self.net[4].weight.sum()

    kept: list[bool] = []
    fit(Replaces(None), batches(count=4), NaNGuard(observe=observe), folder=tmp_path)
    assert kept == [not observe] * 3


@pytest.mark.parametrize("way", ["adamw", "accumulated"])
def test_a_healthy_run_runs_each_batch_once(way: str, tmp_path: Path, folder: Path) -> None:
    """Nothing is run twice, and nothing differs from a run without a guard."""
    left, run = train(None, tmp_path, guard=NaNGuard(), **WAYS[way])
    assert run.module.steps == 24  # type: ignore[attr-defined]
    assert differences(left, twin(way, folder)) == []


@pytest.mark.parametrize("writes", ["batch", "weights"])
def test_a_step_that_writes_into_what_it_begins_from_is_left_alone(writes: str, tmp_path: Path) -> None:
    """It would not be the same step again, so its batch is skipped."""

    class Writes(Faulty):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            with torch.no_grad():
                (batch[0] if writes == "batch" else self.net[0].weight).mul_(1.01)
            return super().training_step(batch, batch_idx)

    guard = NaNGuard()
    fit(Writes(Fault("loss", (4,))), batches(), guard, folder=tmp_path)
    assert words(guard) == [("skip",)]


class Carries(Faulty):
    """Carries what the newest batch gave, in a part of its own."""

    def __init__(self, fault: Fault | None, never: int = -1) -> None:
        super().__init__(fault)
        self.never = never
        self.net[0].newest = torch.zeros(OUTPUTS)  # type: ignore[assignment]
        self.collected: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == self.never:
            self.net[3](torch.zeros(len(batch[0]), 8))
            return self.net[4].weight.sum() * 0 + random.random() + float(np.random.rand())
        y = self.net(batch[0])
        loss = (y - batch[1] + 0.1 * self.net[0].newest).square().mean() * (
            1 + random.random() + float(np.random.rand())
        )
        self.net[0].newest = y.detach().mean(0)  # type: ignore[assignment]
        self.collected.append(float(loss.detach()))
        return loss


def test_a_carried_state_goes_back_with_its_batch(tmp_path: Path) -> None:
    """Where a batch is skipped, what it left in attributes goes too: the next batch begins from the state before it."""
    data = batches(count=12)
    data[6] = with_nan(data[6])
    ends = []
    for module, guard in ((Carries(None), NaNGuard()), (Carries(None, never=6), None)):

        class Leaves(Callback):
            """Makes no update of the batch that is left out."""

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                if pl_module.never >= 0 and pl_module.fault.batch == pl_module.never:
                    for parameter in pl_module.parameters():
                        parameter.grad = None

        run = fit(module, data, guard, folder=tmp_path, callbacks=[Leaves()])
        ends.append({**learner_of(run.trainer, module), "carried": module.net[0].newest, "all": module.collected})
    assert differences(*ends) == []


# ---------------------------------------------------------------------------------------------------- exceptions


class Checks(Faulty):
    """Checks its loss, in one of several ways."""

    kind = "own"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.kind == "distribution":
            mean, scale = self.net(batch[0]).unbind(1)
            normal = torch.distributions.Normal(mean, scale.exp(), validate_args=True)
            return -normal.log_prob(batch[1][:, 0]).mean()
        if self.kind == "solver":
            x = batch[0]
            values = torch.linalg.eigvalsh(x.T @ x)
            return super().training_step(batch, batch_idx) + 0.0 * values.sum()
        loss = super().training_step(batch, batch_idx)
        if self.kind == "own" and not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite")
        if self.kind == "assert":
            assert torch.isfinite(loss)
        return loss


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["own", "assert", "distribution", "solver", "detect_anomaly"])
def test_an_exception_made_of_numbers_costs_its_batch(kind: str, accumulate: int, tmp_path: Path) -> None:
    """The batch that causes it is skipped like one whose loss is NaN, with its sample, and the run goes on as if the
    batch had never been there; in a window only its micro-batch is left out."""
    data = batches(count=12)
    data[7] = with_nan(data[7], row=2)
    module = Checks(None)
    module.kind = kind
    guard = NaNGuard()
    options = {"detect_anomaly": kind == "detect_anomaly", "accumulate_grad_batches": accumulate}
    run = fit(module, data, guard, folder=tmp_path, **options)
    assert run.trainer.global_step == 12 / accumulate
    (found,) = guard.interventions
    assert found.remedies == (("skip",) if accumulate == 1 else ("leave out",))
    assert (found.fault, found.cause, found.batch_idx) == ("non_finite_loss", "non_finite_input", 7)
    assert found.finding is not None
    assert found.finding.samples == (2,)
    if kind != "detect_anomaly":
        assert "training_step raised" in found.message
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError, "the user's"),
        (AssertionError, "the user's"),
        (ArithmeticError, "the user's"),
        (KeyError, "the user's"),
        (RuntimeError, "CUDA error: device-side assert"),
        (torch.OutOfMemoryError, "out of memory"),
    ],
)
@pytest.mark.parametrize("when", ["index", "shape", "count"])
def test_every_other_exception_is_the_users(error: Any, text: str, when: str, tmp_path: Path) -> None:
    """Whatever its type, one that numbers do not cause ends the run, as it is and with its traceback."""
    data = batches(count=12)
    if when == "shape":
        data[7] = (data[7][0][:3], data[7][1][:3])

    class Raises(Faulty):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if {"index": batch_idx == 7, "shape": len(batch[0]) == 3, "count": self.steps == 8}[when]:
                self.raise_it()
            return loss

        def raise_it(self) -> None:
            raise error(text)

    guard = NaNGuard()
    with pytest.raises(error, match=text) as raised:
        fit(Raises(None), data, guard, folder=tmp_path)
    assert type(raised.value) is error
    assert raised.traceback[-1].name == "raise_it"
    assert words(guard) == []


def test_an_exception_before_any_healthy_batch_is_the_users(tmp_path: Path) -> None:
    """There is nothing to compare with."""
    module = Checks(None)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(module, [with_nan(batch) for batch in batches(count=4)], NaNGuard(), folder=tmp_path)


def test_an_exception_of_bad_weights(tmp_path: Path) -> None:
    """Where the weights are the cause, the run goes back to good ones."""

    class Loses(Checks):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if batch_idx == 7:
                with torch.no_grad():
                    self.net[0].weight[0, 0] = math.nan

    guard = NaNGuard(snapshot_every_n_steps=2)
    module = Loses(None)
    fit(module, batches(count=12), guard, folder=tmp_path)
    assert [one.remedies for one in guard.interventions] == [("restore", "redo")]
    assert guard.interventions[0].place == "parameter net.0.weight"


def test_an_exception_of_a_diverged_model(tmp_path: Path) -> None:
    """Weights that are finite and far too large raise under every batch: the batch is not blamed."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    module = Checks(None)
    fit(module, batches(count=12), guard, folder=tmp_path, callbacks=[Diverge(7)])
    first = guard.interventions[0]
    assert "restore" in first.remedies
    assert "training_step raised" in first.message
    assert max(float(parameter.detach().abs().max()) for parameter in module.parameters()) < 10
