"""By default a finite run is the same, bit by bit, with and without the guard, and each batch is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributions import StudentT

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Batch,
    FaultAt,
    Run,
    States,
    Task,
    TwoOptimizers,
    batches,
    cnn,
    differences,
    fit,
    learner_of,
    mlp,
    seed_all,
    state_of,
)

STEPS = 160


# The batches that steps were run on. What a module holds itself is put back after a batch was run again.
CALLS: list[int] = []


class CountsCalls(Task):
    """Notes each time its step is run."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        CALLS.append(batch_idx)
        return super().training_step(batch, batch_idx)


class CountsManualCalls(TwoOptimizers):
    """The same under manual optimization."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        CALLS.append(batch_idx)
        super().training_step(batch, batch_idx)


def in_units() -> list[Batch]:
    return [(x, 150 + 50 * y) for x, y in batches(count=STEPS)]


def noise() -> list[Batch]:
    return [(x, torch.randn_like(y)) for x, y in batches(count=STEPS)]


def by_target() -> list[Batch]:
    x, y = (torch.cat(part) for part in zip(*batches(count=STEPS), strict=True))
    order = y[:, 0].argsort()
    return list(zip(x[order].split(8), 5 * torch.stack(y[order].split(8)), strict=True))


def adam(rate: float) -> Callable[[list[nn.Parameter]], optim.Optimizer]:
    return lambda parameters: optim.Adam(parameters, rate)


Make = Callable[[], Any]
RUNS: dict[str, tuple[Make, Callable[[], list[Batch]]]] = {
    "targets in units": (lambda: CountsCalls(nn.Linear(6, 2), adam(0.1)), in_units),
    "noise": (lambda: CountsCalls(mlp(), adam(0.1)), noise),
    "sorted by target": (lambda: CountsCalls(mlp(), adam(0.02)), by_target),
    "a rate too high": (lambda: CountsCalls(mlp(), adam(5.0)), lambda: batches(count=STEPS)),
    "batch norm": (lambda: CountsCalls(mlp(norm=True)), lambda: batches(count=STEPS)),
    "dropout": (lambda: CountsCalls(cnn()), lambda: batches("images", STEPS)),
    "manual": (lambda: CountsManualCalls(), lambda: batches(count=STEPS)),
}


def trained(
    make: Make, data: list[Batch], guard: NaNGuard | None, folder: Path, *more: Any, **options: Any
) -> tuple[Run, dict[str, Any]]:
    """A run, and what it leaves: also the learner after each update, and the batches its step was run on."""
    seed_all(0)
    CALLS.clear()
    states = States()
    run = fit(make(), data, guard, folder=folder, callbacks=[*(one() for one in more), states], **options)
    return run, {**state_of(run), "after": states.after, "calls": [*CALLS]}


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list):
        for value in state:
            yield from tensors(value)


def writes(run: Run) -> list[int]:
    """How often each tensor of the learner was written in place."""
    return [tensor._version for tensor in tensors(learner_of(run.trainer, run.module))]


def assert_untouched(make: Make, data: list[Batch], folder: Path, *more: Any, **options: Any) -> NaNGuard:
    """Nothing differs from a run without the guard: values, random numbers, calls and writes."""
    guard = NaNGuard(snapshot_every_n_steps=10)
    bare, left = trained(make, data, None, folder, *more, **options)
    guarded, left_guarded = trained(make, data, guard, folder, *more, **options)
    assert differences(left, left_guarded) == []
    assert writes(guarded) == writes(bare)
    assert left["calls"] == [*range(len(data))]
    assert list(guard.interventions) == []
    assert guard.lr_multiplier == 1.0
    return guard


@pytest.mark.parametrize("name", RUNS)
def test_a_finite_run_is_untouched(name: str, tmp_path: Path) -> None:
    """Whatever its loss does: no batch is run twice, no tensor is written, and nothing is on record."""
    make, data = RUNS[name]
    assert_untouched(make, data(), tmp_path)


def jumps() -> FaultAt:
    return FaultAt("loss", 100.0, range(80, STEPS))


def test_a_loss_that_jumps_is_advice(tmp_path: Path) -> None:
    """A loss that is a hundred times as high from some update on is suspected, and the user is told; the run is not
    touched."""
    make, data = RUNS["noise"]
    guard = assert_untouched(make, data(), tmp_path, jumps)
    assert {one.occasion for one in guard.advice} == {"a finite suspicion"}
    assert all("Nothing was changed" in one.finding.suggestion for one in guard.advice)


def test_evidence_is_looked_for_where_it_is_asked_for(tmp_path: Path) -> None:
    """The same run under ``act_on="evidence"`` runs batches again. It gives such advice only where no trial fits into
    the rest of the run."""
    make, data = RUNS["noise"]
    guard = NaNGuard(snapshot_every_n_steps=10, act_on="evidence")
    trained(make, data(), guard, tmp_path, jumps)
    assert len(CALLS) > STEPS
    assert {one.global_step for one in guard.advice} <= {STEPS - 1}


def student(freedom: float, targets: bool, seed: int) -> list[Batch]:
    seed_all(seed)
    law, hidden = StudentT(freedom), torch.randn(6, 2)
    inputs = [law.sample((32, 6)) for _ in range(200)]
    return [(x, x @ hidden + (law.sample((32, 2)) if targets else 0.1 * torch.randn(32, 2))) for x in inputs]


@pytest.mark.parametrize("net", [lambda: nn.Linear(6, 2), mlp], ids=["linear", "mlp"])
@pytest.mark.parametrize(
    ("freedom", "targets"), [(2.0, False), (1.0, False), (1.0, True)], ids=["two", "one", "Cauchy noise, too"]
)
@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_are_untouched(net: Make, freedom: float, targets: bool, seed: int, tmp_path: Path) -> None:
    """Inputs by Student's t with two degrees of freedom or one, which is Cauchy's, are no fault of the batch: norms
    and inputs reach thousands of times what was seen before."""
    data = student(freedom, targets, seed)
    assert_untouched(lambda: CountsCalls(net(), adam(0.01)), data, tmp_path, gradient_clip_val=1.0)
