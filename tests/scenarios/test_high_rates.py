"""A learning rate far too high, from the start or by a scheduler in mid-run, costs little with the guard."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits, load_wine
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.investigator import norms_to_grow_from
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.record.messages import tell

STEPS = 300

# Most of these losses stay finite, however wrong.
Guard = partial(NaNGuard, act_on="evidence")

# The rate at which the run below does best, and the largest at which it still converges (its training loss ends below a
# tenth of where it began, in a sweep by factors of two).
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float, float]] = {
    "sgd": (torch.optim.SGD, 0.5, 0.5),
    "momentum": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 0.1, 0.2),
    "adam": (torch.optim.Adam, 3e-3, 9.6e-2),
    "adagrad": (torch.optim.Adagrad, 0.03, 0.48),
}


@cache
def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return TensorDataset(x[:1400], y[:1400]), x[1400:], y[1400:]


def shuffled(data: TensorDataset, size: int) -> DataLoader[list[Tensor]]:
    """Batches in another order in every epoch, each indexed at once rather than sample by sample."""
    sampler = BatchSampler(RandomSampler(data), size, drop_last=False)
    return DataLoader(data, sampler=sampler, batch_size=None)


class Digits(LightningModule):
    """A ReLU network for the digits: it dies for good where a rate is too high."""

    def __init__(self, optimizer: str, rate: Callable[[int], float]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = OPTIMIZERS[self.optimizer][0](self.parameters(), lr=1.0)
        scheduler = LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def held_out(self) -> float:
        """Share of the held-out digits that are told right: unlike the loss, it tells sound runs apart by little."""
        _, x, y = digits()
        with torch.no_grad():
            return float((self.net(x).argmax(1) == y).float().mean())


def improvement(
    optimizer: str, rate: Callable[[int], float], guard: NaNGuard | None, steps: int = STEPS, draw: int = 0
) -> float:
    torch.manual_seed(draw)
    module = Digits(optimizer, rate)
    before = module.held_out()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if guard is None else [guard],
    )  # fmt: skip
    trainer.fit(module, shuffled(digits()[0], 64))
    return module.held_out() - before


@cache
def right(optimizer: str, draw: int = 0) -> float:
    return improvement(optimizer, lambda step: OPTIMIZERS[optimizer][1], None, draw=draw)


def regains(attempt: Callable[[int], tuple[float, NaNGuard]], optimizer: str) -> bool:
    """Whether an attempt regains 90 % of the right rate's improvement by a cut; where the first draw does not, the next
    two have to: at such rates the rounding of a processor makes another draw, and a draw in thirty goes astray."""

    def did(draw: int) -> bool:
        regained, guard = attempt(draw)
        for found in guard.interventions:
            assert ("scale" in found.remedies) == (found.lr_after < found.lr_before)
        return regained >= 0.9 * right(optimizer, draw) and guard.lr_multiplier < 1

    return did(0) or (did(1) and did(2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [10, 100, 10_000])
@pytest.mark.parametrize("since", [0, 150], ids=["from the start", "in mid-run"])
def test_a_rate_too_high_is_found_and_cut(optimizer: str, factor: int, since: int, tmp_path: object) -> None:
    """At 10 to 10,000 times the largest rate that converges, 90 % of the right rate's improvement is regained."""
    _, best, largest = OPTIMIZERS[optimizer]

    def attempt(draw: int) -> tuple[float, NaNGuard]:
        guard = Guard(dirpath=str(tmp_path), snapshot_every_n_steps=16)
        rate = lambda step: best if step < since else factor * largest  # noqa: E731
        return improvement(optimizer, rate, guard, draw=draw), guard

    assert regains(attempt, optimizer)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("since", [0, 150], ids=["from the start", "in mid-run"])
def test_a_rate_whose_loss_overflows_is_cut_by_default(optimizer: str, since: int, tmp_path: object) -> None:
    """Under ``act_on="certain"`` such a run is saved where its numbers first cease to be finite."""
    _, best, largest = OPTIMIZERS[optimizer]

    def attempt(draw: int) -> tuple[float, NaNGuard]:
        guard = NaNGuard(dirpath=str(tmp_path), snapshot_every_n_steps=16)
        rate = lambda step: best if step < since else 10_000 * largest  # noqa: E731
        return improvement(optimizer, rate, guard, draw=draw), guard

    assert regains(attempt, optimizer)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("factor", [1e4, 1e8, 1e12])
def test_a_rate_too_high_is_cut_where_numbers_arrive_late(
    optimizer: str, factor: float, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In deferred readback the bad update was made before it is known; when it comes back, the rate is cut all the
    same, and 90 % of the right rate's improvement is regained."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)

    def attempt(draw: int) -> tuple[float, NaNGuard]:
        guard = Guard(dirpath=str(tmp_path), snapshot_every_n_steps=16, readback="deferred")
        return improvement(optimizer, lambda step: factor * OPTIMIZERS[optimizer][2], guard, draw=draw), guard

    assert regains(attempt, optimizer)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_ruin_that_is_only_observed_is_advice(optimizer: str, tmp_path: object) -> None:
    """With ``observe=True`` no trial is made, so a rate a hundred times too high is advice, said once."""
    guard = Guard(dirpath=str(tmp_path), observe=True)
    improvement(optimizer, lambda step: 100 * OPTIMIZERS[optimizer][2], guard)
    told = [advice.finding.cause for advice in guard.advice]
    assert told == ["learning_rate_too_high"]
    assert not {"exploding_loss", "stuck_loss"} & {found.fault for found in guard.interventions}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_peak_in_the_schedule_is_survived_and_the_cut_given_back(optimizer: str, tmp_path: object) -> None:
    """After a peak 100 times too high has passed, the run is back at its schedule."""
    _, best, largest = OPTIMIZERS[optimizer]
    guard = Guard(dirpath=str(tmp_path), snapshot_every_n_steps=16)
    rate = lambda step: 100 * largest if 120 <= step < 140 else best  # noqa: E731
    regained = improvement(optimizer, rate, guard, steps=600)
    assert regained >= 0.9 * right(optimizer)
    assert guard.lr_multiplier > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_right_rate_is_left_alone(optimizer: str, tmp_path: object) -> None:
    """A run at its best rate, and one at the largest that converges, see no intervention."""
    for rate in OPTIMIZERS[optimizer][1:]:
        guard = Guard(dirpath=str(tmp_path), snapshot_every_n_steps=16)
        assert improvement(optimizer, lambda step, rate=rate: rate, guard) > 0
        assert list(guard.interventions) == []


class Wide(LightningModule):
    """A linear model of many inputs with the same mean, along which the loss is steep: a low rate is too high."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005)


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_ends_within_what_the_curvature_allows(seed: int, tmp_path: object) -> None:
    """The rate found too high is cut below the largest that the loss allows by the finding."""
    torch.manual_seed(seed)
    x = 6 + 0.05 * torch.randn(24 * 60, 300)
    guard = NaNGuard(dirpath=str(tmp_path))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard],
    )  # fmt: skip
    trainer.fit(Wide(), DataLoader(TensorDataset(x, torch.tanh(x[:, :2] - 6)), 24))
    cuts = [found for found in guard.interventions if "scale" in found.remedies]
    assert cuts
    for found in cuts:
        assert found.finding is not None
        allowed = found.finding.evidence["largest_rate"]
        assert isinstance(allowed, float)
        assert found.lr_after is not None
        assert found.lr_after <= 1.001 * allowed


class Wine(LightningModule):
    """A network for so few samples that it learns all of them at any rate."""

    def __init__(self, lr: float, *, small: bool) -> None:
        super().__init__()
        self.lr = lr
        self.small = small
        self.net = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 3))
        if small:
            nn.init.normal_(self.net[2].weight, std=1e-4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * (20 if self.small and self.global_step == 1 else 1)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.RMSprop(self.parameters(), lr=self.lr)


def wine(lr: float, guard: NaNGuard | None, *, small: bool = False) -> float:
    """Held-out loss in the end; with ``small`` the last layer begins at nothing, and one early loss is far up."""
    inputs, kinds = load_wine(return_X_y=True)
    torch.manual_seed(3)
    order = torch.randperm(len(kinds))
    x, y = torch.tensor(inputs, dtype=torch.float32)[order], torch.tensor(kinds)[order]
    x = (x - x.mean(0)) / x.std(0)
    module = Wine(lr, small=small)
    trainer = Trainer(
        max_epochs=25, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if guard is None else [guard],
    )  # fmt: skip
    trainer.fit(module, shuffled(TensorDataset(x[:128], y[:128]), 16))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.net(x[128:]), y[128:]))


def test_a_parameter_that_began_at_zero_has_no_growth() -> None:
    """Positions or a class token may become as large as they like; a small layer grows from an ordinary one."""
    leaves = [
        (("parameter", "positions"), torch.zeros(1, 64, 64)),
        (("parameter", "small"), torch.full((12, 4), 1e-6)),
        (("parameter", "large"), torch.ones(12, 4)),
        (("parameter", "bias"), torch.ones(12)),
    ]
    begun = norms_to_grow_from(leaves)
    assert begun == {"positions": 0.0, "small": 2.0, "large": pytest.approx(48**0.5)}


def test_a_layer_that_began_at_next_to_nothing_may_grow(tmp_path: object) -> None:
    """To hundreds of times its norm, also where an early loss was far up: it is an ordinary layer by then."""
    guard = Guard(dirpath=str(tmp_path))
    wine(0.01, guard, small=True)
    assert list(guard.interventions) == []


@pytest.mark.parametrize(("steps", "helped"), [(103, False), (104, True)])
def test_a_run_that_is_too_short_for_a_trial(steps: int, helped: bool, tmp_path: Path) -> None:
    """The pages say how many updates a run needs, so that ``act_on="evidence"`` can help."""
    guard = Guard(dirpath=tmp_path)
    improvement("adam", lambda step: 100 * OPTIMIZERS["adam"][2], guard, steps=steps)
    assert bool(guard.interventions) is helped
    for page in ("README.md", "docs/start.md"):
        assert "run of fewer than 104 updates" in (Path(__file__).parents[2] / page).read_text(encoding="utf-8")


class ByHand(Digits):
    """The same network, trained by manual optimization on a loss that has no upper bound."""

    def __init__(self, rate: float) -> None:
        super().__init__("momentum", lambda step: rate)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        rows = nn.functional.one_hot(batch[1], 10).float()
        self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), rows))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS["momentum"][0](self.parameters(), self.rate(0))


def test_a_rate_far_too_high_is_named_where_no_batch_can_be_run_again(tmp_path: Path) -> None:
    """Under manual optimization the cause follows the verdict: the guard blames the learner and lowers the rate, and so
    the words name the rate, and the one at which the run goes on, and do not advise to clip."""
    torch.manual_seed(0)
    guard, module = NaNGuard(dirpath=tmp_path), ByHand(100.0)
    trainer = Trainer(
        accelerator="cpu", callbacks=[guard], max_steps=90, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(digits()[0], 32))
    first = guard.interventions[0]
    assert (first.cause, first.lr_before) == ("learning_rate_too_high", 100.0)
    assert first.lr_after is not None
    assert first.lr_after < 1.0
    said = tell(first)
    assert f"This run goes on at {first.lr_after:.4g}" in said
    assert "clip_gradients" not in said


def test_weights_that_their_own_updates_made_implausible(tmp_path: Path) -> None:
    """The updates are made again, and the weight is as large again: so the rate is cut at the first rollback."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    class Normed(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 100.0, momentum=0.9)
            falls = LambdaLR(optimizer, lambda step: 1.0 if step < 17 else 0.1)
            return [optimizer], [{"scheduler": falls, "interval": "step"}]

    guard = NaNGuard(snapshot_every_n_steps=20, dirpath=tmp_path)
    trainer = Trainer(
        accelerator="cpu", callbacks=[guard], max_steps=90, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Normed(), DataLoader(digits()[0], 32))
    first = guard.interventions[0]
    assert (first.fault, first.cause) == ("implausible_state", "learning_rate_too_high")
    assert {"restore", "scale"} <= set(first.remedies)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(digits()[1]), digits()[2])
    assert float(loss) < 1.0
