"""The update of a bad batch is made from its good samples, exactly as if the loader had given those alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchmetrics import MeanSquaredError

from lightning_nanguard import NaNGuard, SkipStep
from lightning_nanguard.act.defaults import default_remedies
from tests.helpers import Task, batches, differences, fit, mlp, samples, state_of, words

BAD = {3: math.nan, 17: math.inf, 18: 1e30, 40: -math.inf}
SIZE = 8


def data(bad: dict[int, float]) -> list[Any]:
    made = samples(batches(count=12, size=SIZE))
    for row, value in bad.items():
        x = made[row][0].clone()
        x[2] = value
        made[row] = (x, made[row][1])
    return made


def kept() -> NaNGuard:
    return NaNGuard(remedies=[SkipStep(keep_good_samples=True), *default_remedies()])


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))


def loader(*, good: bool, bad: dict[int, float] = BAD, **options: Any) -> DataLoader[Any]:
    """The batches, or with ``good`` what a loader gives that leaves the bad rows out."""
    if not good:
        return DataLoader(data(bad), batch_size=SIZE, **options)
    rows = [[row for row in range(start, start + SIZE) if row not in bad] for start in range(0, 96, SIZE)]
    return DataLoader(data(bad), batch_sampler=rows, **options)


def made(net: Callable[[], nn.Module], optimizer: Any = None) -> Task:
    torch.manual_seed(0)
    return Task(net(), optimizer, metric=MeanSquaredError())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout and batch norm": {"net": dropping},
    "clipped": {"gradient_clip_val": 0.1},
    "two micro-batches": {"accumulate_grad_batches": 2},
    "three micro-batches": {"accumulate_grad_batches": 3, "net": dropping},
    "fp16": {"precision": "16-mixed", "bad": {3: math.nan, 17: math.nan, 40: math.nan}},
    "momentum": {"optimizer": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)},
}


@pytest.mark.parametrize("case", CASES)
def test_as_if_the_loader_had_given_the_good_samples(case: str, tmp_path: Path) -> None:
    """Weights, optimizer, statistics, metrics, means and random numbers are bit by bit those of the smaller batch."""
    options = {"max_epochs": 2} | CASES[case]
    net, optimizer = options.pop("net", mlp), options.pop("optimizer", None)
    guard, bad = kept(), options.pop("bad", BAD)
    own = fit(made(net, optimizer), loader(good=False, bad=bad), guard, folder=tmp_path, **dict(options))
    bare = fit(made(net, optimizer), loader(good=True, bad=bad), folder=tmp_path, **dict(options))
    assert differences(state_of(own), state_of(bare)) == []
    assert set(words(guard)) == {("keep good samples",)}
    assert len(guard.interventions) == 6
    assert [one.finding.rows for one in guard.interventions if one.finding is not None][:1] == [(3,)]


def test_a_number_out_of_proportion(tmp_path: Path) -> None:
    """A batch that would be skipped for a finite number far beyond all others is learned from without that sample."""

    def linear() -> nn.Module:
        return nn.Linear(6, 2)

    far = {90: 1e6}
    guards = [NaNGuard(), kept()]
    skipped = fit(made(linear), loader(good=False, bad=far), guards[0], folder=tmp_path / "a")
    own = fit(made(linear), loader(good=False, bad=far), guards[1], folder=tmp_path / "b")
    bare = fit(made(linear), loader(good=True, bad=far), folder=tmp_path / "c")
    assert [words(guard) for guard in guards] == [[("skip",)], [("keep good samples",)]]
    assert differences(state_of(own), state_of(bare)) == []
    assert differences(state_of(skipped), state_of(bare)) != []


class Coupled(Task):
    """A loss that is no mean over samples."""

    def __init__(self, kind: str) -> None:
        super().__init__(mlp())
        self.kind = kind

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        if self.kind == "sum":
            return (out - y).square().sum()
        return torch.nn.functional.cross_entropy(out @ out.T, torch.arange(len(x)))


def collate(items: list[Any]) -> Any:
    return default_collate(items)


WHOLE: dict[str, tuple[Callable[[], Task], dict[str, Any], dict[str, Any], str]] = {
    "sum": (lambda: Coupled("sum"), {}, {}, "not the mean of the losses"),
    "contrastive": (lambda: Coupled("contrastive"), {}, {}, "not the mean of the losses"),
    "collate": (lambda: Task(mlp()), {"collate_fn": collate}, {}, "default_collate did not"),
    "lbfgs": (lambda: Task(mlp(), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)), {}, {}, "without LBFGS"),
    "deferred": (lambda: Task(mlp()), {}, {"readback": "deferred"}, "step readback"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_else_the_batch_is_skipped(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a batch must not be taken apart it is skipped as without the option, and that is said once."""
    make, options, arguments, said = WHOLE[case]
    guards = [NaNGuard(**arguments), NaNGuard(remedies=[SkipStep(True), *default_remedies()], **arguments)]
    ends = []
    for guard in guards:
        torch.manual_seed(0)
        with caplog.at_level(logging.WARNING, logger="lightning_nanguard"):
            run = fit(make(), loader(good=False, **options), guard, folder=tmp_path / str(len(ends)), max_epochs=2)
        ends.append(state_of(run))
    assert differences(*ends) == []
    assert words(guards[0]) == words(guards[1])
    assert ("skip",) in words(guards[1])
    assert caplog.text.count("no update can be made from the good samples") == caplog.text.count(said) == 1


class Checks(Task):
    """Refuses what is not finite."""

    def training_step(self, batch: Any, index: int) -> Any:
        if not bool(torch.isfinite(batch[0]).all()):
            raise ValueError("the input is not finite")
        return super().training_step(batch, index)


def test_a_check_that_raises(tmp_path: Path) -> None:
    """An exception that only the bad samples cause is treated like their NaN."""
    torch.manual_seed(0)
    guard = kept()
    own = fit(Checks(mlp()), loader(good=False), guard, folder=tmp_path)
    torch.manual_seed(0)
    bare = fit(Task(mlp()), loader(good=True), folder=tmp_path)
    assert differences(state_of(own), state_of(bare)) == []
    assert all(one.remedies == ("keep good samples",) for one in guard.interventions)


def test_where_most_updates_were_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By default good samples are kept once most updates were skipped, which is said once; with ``False`` never."""
    bad = dict.fromkeys(range(0, 96, 6), math.nan)
    guards = [NaNGuard(), NaNGuard(remedies=[SkipStep(keep_good_samples=False), *default_remedies()])]
    with caplog.at_level(logging.WARNING, logger="lightning_nanguard"):
        for guard in guards:
            torch.manual_seed(0)
            fit(Task(mlp()), loader(good=False, bad=bad), guard, folder=tmp_path / str(id(guard)), max_epochs=3)
    kept, skipped = map(words, guards)
    assert set(kept[:20]) == {("skip",)}
    assert set(kept[20:]) == {("keep good samples",)}
    assert set(skipped) == {("skip",)}
    assert caplog.text.count("most updates had to be skipped") == 1


def test_the_option_is_checked() -> None:
    """The option is true, false or nothing."""
    assert SkipStep().keep_good_samples is None
    with pytest.raises(ValueError, match="keep_good_samples=1"):
        SkipStep(keep_good_samples=1)  # type: ignore[arg-type]


class ComparesOutputs(Task):
    """Its hook compares what its step returned with the batch, which fails if their sizes differ."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.errors: list[float] = []
        self.losses: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self.net(batch[0])
        return {"loss": (prediction - batch[1]).square().mean(), "prediction": prediction}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["loss"].isfinite() or not outputs["prediction"].requires_grad
        self.errors.append(float((outputs["prediction"] - batch[1]).detach().square().nanmean()))
        self.losses.append(outputs["loss"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        self.given = [float(loss) for loss in [optimizer.step(closure=closure)] if loss is not None]
        assert all(map(math.isfinite, self.given))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_what_hooks_get(window: int, tmp_path: Path) -> None:
    """The outputs of the whole batch that they are given, without a graph; the optimizer gets the loss of the rest."""
    guard, module = kept(), ComparesOutputs()
    data = loader(good=False, bad={3: math.nan, 17: math.nan, 40: math.nan})
    run = fit(module, data, guard, folder=tmp_path, accumulate_grad_batches=window)
    assert set(words(guard)) == {("keep good samples",)}
    assert len(module.errors) == run.trainer.num_training_batches == 12
    bad = [index for index, loss in enumerate(module.losses) if not torch.isfinite(loss)]
    assert bad == [0, 2, 5]
    assert all(math.isfinite(error) for index, error in enumerate(module.errors) if index not in bad)
