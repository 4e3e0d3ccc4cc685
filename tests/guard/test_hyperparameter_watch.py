"""Updates with a learning rate or another hyperparameter that is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_nanguard import NaNGuard
from tests.helpers import Task, batches, differences, fit, learner_of, mlp, words

NAN, INF = math.nan, math.inf


def run_with(
    shape: Callable[[int], float], make: Callable[..., Optimizer], folder: Path, guard: NaNGuard | None, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = Task(mlp(), make, lambda optimizer: LambdaLR(optimizer, shape))
    return fit(module, batches(count=12), guard, folder=folder, **options)


@pytest.mark.parametrize("options", [{}, {"precision": "16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.05),
        lambda p: AdamW(p, lr=torch.tensor(0.01)),
        lambda p: LBFGS(p, lr=0.1, max_iter=2),
    ],
    ids=["sgd", "tensor rate", "lbfgs"],
)
def test_the_update_is_made_at_the_last_valid_rate(
    make: Callable[..., Optimizer], bad: float, options: dict[str, Any], tmp_path: Path
) -> None:
    """As if the schedule had stood still; group and scheduler are named, once, before the update is made."""
    if options.get("precision") and "LBFGS" in str(type(make([torch.nn.Parameter(torch.ones(1))]))):
        pytest.skip("Lightning refuses LBFGS with a GradScaler")
    guard = NaNGuard(dirpath=tmp_path)
    at = 3 if "accumulate_grad_batches" in options else 6
    guarded = run_with(lambda n: bad if n >= at else 1.0, make, tmp_path, guard, **options)
    sound = run_with(lambda n: 1.0, make, tmp_path, None, **options)
    left = [learner_of(one.trainer, one.module) for one in (guarded, sound)]
    for one in left:
        for optimizer in one["optimizers"]:
            for group in optimizer["param_groups"]:
                group.pop("lr")
    assert differences(*left) == []
    (found,) = guard.interventions
    assert (found.fault, found.remedies, found.global_step) == ("invalid_learning_rate", ("hold rate",), at + 1)
    assert found.finding is not None
    assert found.finding.place == "LambdaLR, group 0"
    assert "group 0" in found.message
    assert "LambdaLR" in found.message
    assert found.lr_after is not None
    assert math.isfinite(found.lr_after)
    rate = float(guarded.trainer.optimizers[0].param_groups[0]["lr"])
    assert rate != rate or not 0 <= rate < INF, "the schedule itself is left alone"


def test_an_update_without_any_valid_rate_is_left_out(tmp_path: Path) -> None:
    """Training begins with the first valid one."""
    guard = NaNGuard(dirpath=tmp_path)
    guarded = run_with(lambda n: 1.0 if n >= 2 else INF, lambda p: SGD(p, lr=0.05), tmp_path, guard)
    assert words(guard) == [("skip",)]
    torch.manual_seed(0)
    module = Task(mlp(), lambda p: SGD(p, lr=0.05))
    sound = fit(module, batches(count=12)[2:], folder=tmp_path)
    assert differences(dict(guarded.module.named_parameters()), dict(sound.module.named_parameters())) == []


def test_many_stretches_are_recorded_now_and_then(tmp_path: Path) -> None:
    """The 1st, 2nd, 4th and 8th; a rate that is none in every other step would fill the records."""
    guard = NaNGuard(dirpath=tmp_path)
    run_with(lambda n: NAN if n % 2 else 1.0, lambda p: SGD(p, lr=0.05), tmp_path, guard, max_epochs=2)
    assert words(guard) == [("hold rate",)] * 4


def test_observing_changes_no_rate(tmp_path: Path) -> None:
    """The record says what would have been done, and the run is the one without the guard."""
    guard = NaNGuard(observe=True, dirpath=tmp_path)
    shape: Callable[[int], float] = lambda n: -0.1 if n == 6 else 1.0  # noqa: E731
    guarded = run_with(shape, lambda p: SGD(p, lr=0.05), tmp_path, guard)
    bare = run_with(shape, lambda p: SGD(p, lr=0.05), tmp_path, None)
    assert differences(learner_of(guarded.trainer, guarded.module), learner_of(bare.trainer, bare.module)) == []
    assert words(guard)[0] == ("hold rate",)
    assert not guard.interventions[0].applied


def test_rates_are_looked_at_once_an_update(tmp_path: Path) -> None:
    """Optimizers may have hundreds of groups."""

    class Counted(dict[str, Any]):
        looks = 0

        def get(self, key: str, default: Any = None) -> Any:
            Counted.looks += key == "lr"
            return super().get(key, default)

    def make(parameters: Any) -> Optimizer:
        optimizer = SGD([{"params": [one]} for one in parameters], lr=0.05)
        optimizer.param_groups = [Counted(group) for group in optimizer.param_groups]
        return optimizer

    module = Task(mlp(), make)
    groups = len(list(module.parameters()))
    fit(module, batches(count=12), NaNGuard(snapshot_every_n_steps=100), folder=tmp_path)
    assert 12 * groups + 12 <= Counted.looks < 24 * groups + 12  # and the first group once more, for outliers


def test_a_weight_decay_that_is_none_is_replaced(tmp_path: Path) -> None:
    """The record names group and key, not the scheduler, which sets the rate; the run is the one without the fault."""

    def run(guard: NaNGuard | None, at: int) -> Any:
        torch.manual_seed(0)
        module = Task(mlp(), lambda p: AdamW(p, lr=0.01), lambda optimizer: LambdaLR(optimizer, lambda n: 1.0))

        def start(batch: Any, batch_idx: int) -> None:
            if batch_idx == at:
                module.optimizers().param_groups[0]["weight_decay"] = INF

        module.on_train_batch_start = start
        return fit(module, batches(count=12), guard, folder=tmp_path)

    guard = NaNGuard(dirpath=tmp_path)
    guarded, sound = run(guard, 6), run(None, -1)
    assert differences(dict(guarded.module.named_parameters()), dict(sound.module.named_parameters())) == []
    (found,) = guard.interventions
    assert (found.fault, found.remedies, found.global_step) == ("invalid_hyperparameter", ("hold value",), 7)
    assert found.place == "weight_decay of group 0"
    assert "LambdaLR" not in found.message
