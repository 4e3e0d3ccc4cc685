"""What a step changes in the objects that the module holds is put back like the module's own attributes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard import NaNGuard
from tests.helpers import (
    Batch,
    FaultAt,
    Task,
    TwoOptimizers,
    batches,
    differences,
    fit,
    mlp,
    state_of,
    with_nan,
    words,
)
from tests.modules import update_by_hand


class Meter:
    """A running mean of a user's."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.values: list[float] = []

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.values.append(value)


class Holds(Task):
    """Keeps numbers in objects, arrays, tensors and containers of every kind."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.meter, self.meters = Meter(), {"a": [Meter()]}
        self.seen, self.by_kind = Counter[int](), defaultdict[int, list[int]](list)
        self.array, self.tensor = np.zeros(3), torch.zeros(3)
        self.space = SimpleNamespace(draws=np.random.default_rng(1), inner={"rows": [np.zeros(1)]})

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch, "loss")
        self.meter.update(loss.item())
        self.meters["a"][0].update(1.0)
        self.seen[batch_idx % 3] += 1
        self.by_kind[batch_idx % 3].append(batch_idx)
        self.array[batch_idx % 3] += 1
        self.tensor[batch_idx % 3] += 1
        self.space.inner["rows"][0] += 1
        return loss * (1 + 0.01 * self.space.draws.random() + 0.001 * (self.meter.count % 2))

    def held(self) -> dict[str, Any]:
        return {
            "meters": [vars(self.meter), vars(self.meters["a"][0])],
            "kinds": [dict(self.seen), dict(self.by_kind)],
            "arrays": [self.array.tolist(), self.tensor.tolist(), self.space.inner["rows"][0].tolist()],
            "draw": self.space.draws.random(),
        }


def bare_and_guarded(make: Callable[[], Any], held: Callable[[Any], Any], folder: Path) -> list[dict[str, Any]]:
    """What a healthy run leaves without a guard, and with one that acts on evidence."""
    both = []
    for guard in (None, NaNGuard(act_on="evidence")):
        torch.manual_seed(0)
        run = fit(make(), batches(count=60), guard, folder=folder, max_epochs=2)
        both.append({"state": state_of(run), "held": held(run.module)})
    return both


def test_a_trial_leaves_no_trace_in_them(tmp_path: Path) -> None:
    """A healthy run with ``act_on="evidence"`` has the same weights, and the same numbers in everything it holds."""
    both = bare_and_guarded(Holds, Holds.held, tmp_path)
    assert not differences(both[0], both[1])


class TwoStreams(Task):
    """Takes a second batch from an iterator of its own, which the step uses up."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.taken = 0
        self.second: Iterator[Batch] = iter(())

    def on_train_epoch_start(self) -> None:
        self.second = iter(batches(count=60, seed=3))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.taken += 1
        x, y = next(self.second)
        return self.loss(batch, "loss") + (self.net(x) - y).square().mean()


def test_an_iterator_is_not_used_up(tmp_path: Path) -> None:
    """Nothing can be put back into an iterator that the module holds, so no trial takes from it."""
    both = bare_and_guarded(TwoStreams, lambda module: module.taken, tmp_path)
    assert not differences(both[0], both[1])
    assert both[0]["held"] == 120


class NamesItsWeights(TwoOptimizers):
    """Holds its parameters, and views of them, in attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.views = list(self.parameters()), {"view": [one.detach() for one in self.parameters()]}


def test_weights_by_another_name_are_left_to_the_learner(tmp_path: Path) -> None:
    """Under manual optimization the good step of one optimizer stays where the other one's is skipped."""
    ends = []
    for make in (TwoOptimizers, NamesItsWeights):
        torch.manual_seed(0)
        guard = NaNGuard()
        fault = FaultAt("gradient", math.nan, (7,))
        run = fit(make(), batches(count=16), guard, folder=tmp_path, callbacks=[fault])
        assert words(guard) == [("skip",)]
        ends.append(run.module.state_dict())
    assert not differences(ends[0], ends[1])


class Scaled(Task):
    """Divides the loss by a running mean of it, wherever that is kept."""

    def __init__(self, place: str, *, manual: bool) -> None:
        super().__init__(mlp())
        self.place, self.automatic_optimization = place, not manual
        self.number, self.array, self.tensor = 1.0, np.ones(1), torch.ones(1)
        self.object, self.nested = SimpleNamespace(value=1.0), [np.ones(1)]

    def scale(self, value: float) -> float:
        if self.place == "number":
            self.number = 0.9 * self.number + 0.1 * value
            return self.number
        if self.place == "object":
            self.object.value = 0.9 * self.object.value + 0.1 * value
            return float(self.object.value)
        kept: Any = {"array": self.array, "tensor": self.tensor, "nested": self.nested[0]}[self.place]
        kept *= 0.9
        kept += 0.1 * value
        return float(kept[0])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch, "loss")
        loss = loss / self.scale(loss.item())
        if self.automatic_optimization:
            return loss
        update_by_hand(self, loss)
        return None


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("place", ["number", "object", "array", "tensor", "nested"])
def test_a_bad_batch_spoils_none_of_them(place: str, manual: bool, tmp_path: Path) -> None:
    """A running number that a NaN loss has made NaN is put back, so that the next batches are good again."""
    guard = NaNGuard()
    data = [with_nan(batch) if index == 20 else batch for index, batch in enumerate(batches(count=40))]
    torch.manual_seed(0)
    run = fit(Scaled(place, manual=manual), data, guard, folder=tmp_path)
    assert words(guard) == [("skip",)]
    assert math.isfinite(run.module.scale(1.0))  # type: ignore[operator]


def test_a_cycle_counts_as_an_iterator(tmp_path: Path) -> None:
    """An endless iterator in a container is found, too."""

    class Cycles(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.streams = {"factor": cycle([1.0, 1.5, 0.5])}

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return self.loss(batch, "loss") * next(self.streams["factor"])

    both = []
    for guard in (None, NaNGuard(act_on="evidence")):
        torch.manual_seed(0)
        both.append(state_of(fit(Cycles(), batches(count=80), guard, folder=tmp_path)))
    assert not differences(both[0], both[1])
