"""The look at the data and the untrained model before the first step: what it says, and that it changes nothing."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from benchmarks.rescue.models import TASKS
from lightning_nanguard import Advice, NaNGuard, TrainingDivergedError
from lightning_nanguard.diagnosis.preflight import Preflight, sample_rows
from lightning_nanguard.record.files import read_file
from lightning_nanguard.record.text import in_words
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from tests.diagnosis.test_diagnostician import Counted, Restless
from tests.helpers import (
    Batch,
    Task,
    batches,
    data_for,
    differences,
    fit,
    mlp,
    samples,
    seed_all,
    state_of,
    task,
    trainer_for,
)
from tests.modules import FromIterator, Gan, Stream, lazy, make
from tests.trainer.test_identity import CASES, DrawsEverywhere
from tests.trainer.test_identity import Case as Healthy
from tests.trainer.test_identity import run as run_case

NAN = math.nan


def advice_of(guard: NaNGuard) -> list[str]:
    return [one.finding.cause for one in guard.advice]


# ---------------------------------------------------------------------------------------------------- what it says


class Classes(Task):
    """A classifier of vectors of six numbers."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> None:
        super().__init__(net)
        self.loss_of = loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss_of(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


def classes(count: int = 8, scale: float = 1.0, largest: int = 5) -> list[Batch]:
    source = torch.Generator().manual_seed(3)
    made = [
        (torch.randn(32, 6, generator=source), torch.randint(0, largest, (32,), generator=source)) for _ in range(count)
    ]
    return [(x * scale, y) for x, y in made]


def deep() -> nn.Module:
    return nn.Sequential(*[part for _ in range(9) for part in (nn.Linear(6, 6), nn.Sigmoid())], nn.Linear(6, 5))


def large() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))
    nn.init.normal_(net[2].weight, std=20)
    return net


def dead() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))
    nn.init.constant_(net[0].bias, -20)
    return net


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))


def one_hot(p: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(p.softmax(1), F.one_hot(y, 5).float())


def spoilt(batch: int) -> list[Batch]:
    data = classes()
    data[batch][0][3, 2] = NAN
    return data


ROWS: list[tuple[str, str, Callable[[], Classes], list[Batch], str]] = [
    ("non_finite_input", "in the first batch", lambda: Classes(small()), spoilt(0), "field 0 of the batch"),
    ("target_out_of_domain", "a class too many", lambda: Classes(small()), classes(largest=7),
     "cross_entropy, test_preflight.py:"),
    ("target_out_of_domain", "log", lambda: Classes(small(), lambda p, y: (p[:, 0] - y.float().log()).square().mean()),
     classes(), "log, test_preflight.py:"),
    ("unnormalised_input", "pixels", lambda: Classes(small()), classes(scale=150), "field 0 of the batch"),
    ("unbalanced_initialisation", "a large layer", lambda: Classes(large()), classes(), "net.2"),
    ("vanishing_gradient", "sigmoids", lambda: Classes(deep()), classes(), "net.0"),
    ("dead_relu", "biases", lambda: Classes(dead()), classes(), "net.1 (ReLU)"),
    ("saturated_activation", "tanh", lambda: Classes(nn.Sequential(nn.Linear(6, 5), Far(), nn.Tanh())), classes(),
     "net.2 (Tanh)"),
    ("double_softmax", "a module", lambda: Classes(nn.Sequential(small(), nn.Softmax(1))), classes(), "net.1 (softmax"),
    ("mse_for_classification", "one-hot", lambda: Classes(small(), one_hot), classes(), "mse_loss, test_preflight.py:"),
]  # fmt: skip


class Far(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 9


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_the_preflight_says_what_is_wrong(
    row: tuple[str, str, Callable[[], Classes], list[Batch], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first step the cause, its place and what to do are on the console, on disk, and in ``advice``."""
    cause, _, build, data, place = row
    torch.manual_seed(0)
    guard = NaNGuard(preflight=True)
    # What is wrong with the run stays wrong: it may well end with an error.
    with contextlib.suppress(IndexError, TrainingDivergedError):
        fit(build(), data, guard, folder=tmp_path, limit_train_batches=1)
    first = guard.advice[0]
    assert (first.occasion, first.global_step, first.finding.cause) == ("preflight", 0, cause)
    assert place in first.finding.place
    assert first.finding.confidence > DEFAULT.confidence.told
    assert f"advice (preflight): {in_words(cause)}" in caplog.text
    (path,) = tmp_path.rglob("advice.jsonl")
    assert read_file(path, Advice.from_dict) == list(guard.advice)


@pytest.mark.parametrize("name", [name for name, chosen in TASKS.items() if not chosen.adversarial])
def test_the_preflight_is_silent_on_healthy_models(name: str, tmp_path: Path) -> None:
    """Not one finding above low confidence on any of the healthy tasks of the rescue suite."""
    chosen = TASKS[name]
    for seed in range(2):
        torch.manual_seed(seed)
        split, net = chosen.data(), chosen.net()
        batch = tuple(tensor[: chosen.batch] for tensor in split.train)
        look = Preflight(net, lambda given, net=net: chosen.loss(net, given, 0), lambda: attributes_kept(net))  # noqa: B023
        loader = DataLoader(TensorDataset(*split.train), chosen.batch)
        assert [one for one in look.findings(batch, loader) if one.confidence > DEFAULT.confidence.told] == []


def test_the_whole_data_set_is_looked_at(tmp_path: Path) -> None:
    """A bad sample that the first batch does not hold is found by its number in the data set."""
    x, y = (torch.cat(part) for part in zip(*batches(count=6), strict=True))
    x[37, 3] = NAN
    guard = NaNGuard(preflight=True)
    fit(task("mlp"), DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), guard, folder=tmp_path)
    (advice,) = guard.advice
    assert (advice.finding.cause, advice.finding.samples) == ("non_finite_input", (37,))
    assert "sample 37 of the data set holds NaN or Inf in field 0, column 3" in advice.finding.suggestion


# ---------------------------------------------------------------------------------------------------- no trace

SOME = CASES[::4]


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_a_run_is_the_same_with_the_preflight(chosen: Healthy, tmp_path: Path) -> None:
    """Weights, buffers, optimizer state, random streams, the order of the data and all that is logged are the same."""
    bare = run_case(chosen, None, tmp_path)
    guard = NaNGuard(preflight=True, readback=chosen.readback)
    assert differences(state_of(bare), state_of(run_case(chosen, guard, tmp_path))) == []
    assert advice_of(guard) == []
    assert {path.name for path in tmp_path.rglob("*.jsonl")} <= {"run.jsonl"}


class Hoards(DrawsEverywhere):
    """Keeps its outputs, counts its steps, and has a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[float] = []
        self.steps = 0
        self.dice = torch.Generator().manual_seed(5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand((), generator=self.dice))
        if self.steps == 1:
            self.log("only once", loss, on_epoch=True)
        self.outputs.append(float(loss.detach()))
        return loss


class Restive(Dataset[Batch]):
    """Samples with noise from every random stream and a generator of its own, and a count of what was read."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data
        self.dice = np.random.default_rng(4)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        self.read.append(index)
        x, y = self.data[index]
        return x + 0.01 * (torch.randn(6) + random.random() + float(np.random.rand()) + self.dice.random()), y


@pytest.mark.parametrize("build", [Hoards, Restless], ids=["hoards", "restless"])
def test_attributes_and_noise_are_put_back(build: Callable[[], Task], tmp_path: Path) -> None:
    """A step that counts and collects, and data that draws random numbers, leave what they would have left."""
    ended = []
    for guard in (None, NaNGuard(preflight=True)):
        torch.manual_seed(3)
        module = build()
        data = Restive(samples(data_for("norm")))
        generator = torch.Generator().manual_seed(8)
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
        ended.append(state_of(fit(module, loader, guard, folder=tmp_path, max_epochs=2)))
        ended[-1]["kept"] = [getattr(module, "outputs", 0), getattr(module, "steps", 0), data.read]
    assert differences(*ended) == []


class Once(IterableDataset[Batch]):
    """A stream that can be read once."""

    def __init__(self, data: list[Batch]) -> None:
        self.source = iter(data)
        self.given = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            self.given += 1
            yield batch


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_stream_is_seen_as_it_passes(tmp_path: Path) -> None:
    """Of data that can be read once the first batch alone is seen, and none is lost."""
    data = spoilt(0)
    for first_is_bad in (True, False):
        stream = Once([*data] if first_is_bad else [*data[1:], data[0]])
        guard = NaNGuard(preflight=True)
        steps = Counted()
        trainer = trainer_for(tmp_path, guard, [steps], limit_val_batches=0)
        trainer.fit(Classes(small()), DataLoader(stream, batch_size=None))
        assert advice_of(guard) == (["non_finite_input"] if first_is_bad else [])
        assert (stream.given, steps.batches) == (8, 8)


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (Gan, DataLoader(samples(batches()), batch_size=8)),
        (make(lazy), batches()),
        (make(kind=FromIterator), batches()),
        (make(), DataLoader(Stream(batches()), batch_size=None)),
    ],
    ids=["manual", "lazy", "iterator", "stream"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*`dataloader_iter`")
def test_where_the_model_cannot_be_run_the_data_is_looked_at(
    build: Callable[[], Any], data: Any, tmp_path: Path
) -> None:
    """Manual optimization, lazy layers and steps that fetch their own batches are left alone."""
    ended = []
    for guard in (None, NaNGuard(preflight=True)):
        seed_all()
        module = build()
        ended.append(fit(module, data, guard, folder=tmp_path).module.state_dict())
        if guard is not None:
            assert advice_of(guard) == []
    assert differences(*ended) == []


def test_a_look_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the preflight, the run goes on."""

    def broken(*args: Any, **options: Any) -> None:
        raise MemoryError("no more")

    for name in ("batch_clues", "measure_layers", "sample_rows"):
        monkeypatch.setattr(f"lightning_nanguard.diagnosis.preflight.{name}", broken)
        guard = NaNGuard(preflight=True)
        fit(task("mlp"), batches(), guard, folder=tmp_path)
        assert (advice_of(guard), list(guard.interventions)) == ([], [])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_resumed_run_is_not_looked_at(tmp_path: Path) -> None:
    """The preflight is for untrained models."""
    path = tmp_path / "last.ckpt"
    fit(Classes(deep()), classes(), folder=tmp_path).trainer.save_checkpoint(path)
    guard = NaNGuard(preflight=True)
    trainer = trainer_for(tmp_path, guard, max_epochs=2, limit_val_batches=0)
    trainer.fit(Classes(deep()), DataLoader(classes(), batch_size=None), ckpt_path=path)
    assert advice_of(guard) == []


def test_what_data_can_be_read_again() -> None:
    """Data sets with numbered samples are; streams and orders of the user's own are not."""
    data = samples(batches(count=40))
    rows = sample_rows(DataLoader(data, batch_size=4))
    assert rows is not None
    assert len(rows[1]) == len(rows[0][0]) == 128
    assert sample_rows(DataLoader(TensorDataset(torch.zeros(9, 2)), shuffle=True))[1] == range(9)  # type: ignore[index]
    assert sample_rows(DataLoader(Once(batches()), batch_size=None)) is None
    assert sample_rows(DataLoader(data, sampler=[1, 2])) is None
    assert sample_rows(batches()) is None
    assert sample_rows(None) is None


def test_attributes_kept_reaches_what_it_promises() -> None:
    """Names, containers and generators come back; new names go; tensors are left to others."""
    net = mlp()
    net.many, net.named, net.dice = [1], {"a": 1}, random.Random(3)  # type: ignore[assignment]
    net.old, net.numbers = np.random.RandomState(2), torch.Generator().manual_seed(1)  # type: ignore[assignment]
    drawn = []
    for _ in range(2):
        with attributes_kept(net):
            net.many.append(2)  # type: ignore[operator]
            net.named = {}  # type: ignore[assignment]
            net.more = 5  # type: ignore[assignment]
            drawn.append([net.dice.random(), net.old.rand(), float(torch.rand((), generator=net.numbers))])  # type: ignore[arg-type, operator]
    assert (net.many, net.named, hasattr(net, "more")) == ([1], {"a": 1}, False)
    assert drawn[0] == drawn[1]
