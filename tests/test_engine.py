"""The Guard in a plain loop, without a Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import PlainHost
from lightning_nanguard import Budget, Detector, Fault, Reading, ReduceLR, Remedy, Rollback, TrainingDivergedError
from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.diagnosis.case import Case, Look
from lightning_nanguard.diagnosis.rules import diagnose
from lightning_nanguard.guard.guard import Settings
from lightning_nanguard.guard.rehearsal import Rehearsal
from lightning_nanguard.types import Evidence, Finding


class Loop(PlainHost):
    """The smallest loop there is: one linear layer, one optimizer."""

    def __init__(
        self,
        *,
        lr: float = 0.1,
        detectors: tuple[Detector, ...] | None = None,
        remedies: tuple[Remedy, ...] | None = None,
        budget: Budget | None = None,
        settings: Settings | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.5, fused=fused)
        self.batch: Tensor | None = None
        self.guard = self.make_guard(
            self.net,
            self.optimizer,
            settings or Settings(snapshot_every=4),
            detectors=detectors,
            remedies=remedies,
            budget=budget,
        )

    def loss(self) -> Tensor:
        assert self.batch is not None
        return (self.net(self.batch) - self.batch.sum(1, keepdim=True)).square().mean()

    def run(
        self,
        batches: int,
        spoil: Callable[[int, Tensor], None] = lambda step, batch: None,
        without: int | None = None,
    ) -> None:
        draw = torch.Generator().manual_seed(1)
        if self.step == 0:
            self.guard.start()
        for number in range(batches):
            self.batch = torch.randn(8, 3, generator=draw)
            if number == without:
                continue
            spoil(self.step, self.batch)
            self.guard.open_batch()
            self.optimizer.zero_grad()
            loss = self.loss()
            self.guard.see_loss(loss)
            loss.backward()
            self.guard.before_step(0)
            self.optimizer.step()
            self.step += 1
            self.guard.close_batch()
        self.guard.flush()

    def batch_finite(self) -> bool | None:
        return None if self.batch is None else bool(torch.isfinite(self.batch).all())

    def probe(self) -> float | None:
        with torch.no_grad():
            return float(self.loss())

    def rehearsal_batches(self) -> int:
        return 1

    def loss_on(self, index: int) -> float | None:
        return self.probe()

    def train_on(self, index: int) -> float | None:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def diagnose(self, fault: Fault, evidence: Evidence, look: Look, update: int) -> Finding | None:
        return diagnose(Case(fault, evidence))

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.net.parameters())


def nan_at(*steps: int) -> Callable[[int, Tensor], None]:
    def spoil(step: int, batch: Tensor) -> None:
        if step in steps:
            batch[0, 0] = math.nan

    return spoil


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "deferred"])
def test_a_bad_batch_leaves_finite_weights(deferred: bool) -> None:
    """In step readback the batch is skipped, in deferred readback undone within two steps."""
    loop = Loop(settings=Settings(snapshot_every=4, deferred=deferred))
    loop.run(30, nan_at(12))
    assert loop.finite()
    (record,) = loop.records
    assert record.remedies == (("restore",) if deferred else ("skip",))
    assert record.global_step <= 13 + 2 * deferred
    assert loop.guard.rate.multiplier == 1.0
    assert loop.probe() is not None


@pytest.mark.parametrize(("deferred", "fused"), [(False, False), (False, True), (True, True)])
def test_a_skip_is_bitwise(deferred: bool, fused: bool) -> None:
    """Skipped before the step, or on the device by a fused optimizer, the batch might as well not have been there."""
    ends = []
    for spoil, without in ((nan_at(12), None), (nan_at(), 12)):
        torch.manual_seed(0)
        loop = Loop(settings=Settings(snapshot_every=4, deferred=deferred), fused=fused)
        loop.run(30, spoil, without)
        moments = [entry["momentum_buffer"] for entry in loop.optimizer.state.values()]
        ends.append([*loop.net.parameters(), *moments])
        assert [record.remedies for record in loop.records] == ([] if without else [("skip",)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_the_first_batch_may_be_bad() -> None:
    """A bad first batch is skipped, and the run starts with the second."""
    loop = Loop()
    loop.run(20, nan_at(0))
    assert loop.finite()
    assert [record.remedies for record in loop.records] == [("skip",)]


def test_a_run_that_never_was_good_ends_soon() -> None:
    """All batches bad from the first: an error that says so, within a bounded number of steps."""
    loop = Loop(budget=Budget(max_bad_batches=12))
    with pytest.raises(TrainingDivergedError, match="no update was ever good: the first 12 were all bad"):
        loop.run(100, nan_at(*range(100)))
    assert loop.step == 12


def test_non_finite_weights_at_the_start_are_named() -> None:
    """A guard does not start from NaN."""
    loop = Loop()
    with torch.no_grad():
        loop.net.bias[0] = math.nan
    with pytest.raises(TrainingDivergedError, match="parameter bias holds NaN or Inf before the first update"):
        loop.run(1)


def test_a_weight_that_goes_bad_by_itself_is_put_back() -> None:
    """Only the state is restored: the rate stays."""
    loop = Loop()
    loop.run(20)
    with torch.no_grad():
        loop.net.weight[0, 1] = math.inf
    loop.run(20)
    assert loop.finite()
    assert [record.remedies for record in loop.records] == [("restore",)]
    assert loop.records[0].place == "parameter weight"
    assert loop.records[0].cause == "corrupted_state"
    assert loop.guard.rate.multiplier == 1.0


def test_a_rate_far_too_high_is_cut_until_the_run_learns() -> None:
    """A linear layer that diverges at its rate ends learning at a lower one."""
    loop = Loop(lr=100.0)
    loop.run(200)
    assert loop.guard.rate.multiplier < 0.1
    last = loop.probe()
    assert last is not None
    assert last < 0.01


def test_a_users_detector_and_its_scope_route_the_remedy() -> None:
    """What a detector of the user's calls a batch's fault is skipped."""

    class Unlucky(Detector):
        def check(self, reading: Reading) -> Fault | None:
            return Fault("unlucky", "batch", "loss", reading.loss, "step 13") if reading.step == 13 else None

    loop = Loop(detectors=(Unlucky(),))
    loop.run(20)
    assert [(record.fault, record.remedies) for record in loop.records] == [("unlucky", ("skip",))]


def test_observing_changes_nothing() -> None:
    """With observe=True a run ends as without a guard, and the records say what would have been done."""
    bare, watched = [], []
    for seen, settings in ((bare, None), (watched, Settings(snapshot_every=4, observe=True))):
        torch.manual_seed(0)
        loop = Loop(settings=settings)
        if settings is None:
            loop.guard.before_step = lambda stream: None  # type: ignore[method-assign]
        loop.run(20, nan_at(15))
        seen += [parameter.detach().clone() for parameter in loop.net.parameters()]
        if settings is not None:
            assert loop.records
            assert not any(record.applied for record in loop.records)
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(bare, watched, strict=True))


def test_a_resumed_guard_goes_on() -> None:
    """Counts, budgets and windows survive a checkpoint."""
    loop = Loop()
    loop.run(40, nan_at(25))
    other = Loop()
    other.guard.load_state_dict(loop.guard.state_dict())
    assert other.guard.state_dict() == loop.guard.state_dict()


def test_a_lasting_rise_of_the_gradient_is_accepted() -> None:
    """A task that changes for good costs a few skipped batches, not the run."""
    loop = Loop()
    loop.run(60)

    def switch(step: int, batch: Tensor) -> None:
        batch *= 30.0

    with torch.no_grad():
        loop.net.weight.zero_()  # the new task has large gradients, and all is well
    loop.run(60, switch)
    assert len(loop.records) <= 6
    assert not any("restore" in record.remedies for record in loop.records[1:])


def test_a_batch_without_an_update_leaves_nothing_waiting() -> None:
    """Losses of batches that no guarded optimizer steps on are not kept."""
    loop = Loop()
    loop.guard.start()
    for _ in range(50):
        loop.guard.open_batch()
        loop.guard.see_loss(torch.tensor(1.0))
        loop.guard.close_batch()
    assert not loop.guard.in_window
    assert loop.guard._meter.losses == []


@pytest.mark.parametrize(
    ("remedies", "cuts"),
    [(None, 3), ((ReduceLR(min_lr=0.01),), 1), ((ReduceLR(rehearse=False),), 0), ((Rollback(),), 0)],
    ids=["as it comes", "down to min_lr", "without rehearsals", "without ReduceLR"],
)
def test_reviews_lower_a_rate_so_often(
    remedies: tuple[Remedy, ...] | None, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reviews say, a rate goes down three times in a row at most, not below ``min_lr``, and not at all where
    the user did not list that remedy; a resumed run counts on."""
    monkeypatch.setattr(ReadingHistory, "falling", lambda self: False)
    monkeypatch.setattr(Rehearsal, "review", lambda self, untrained, *, at_most: 1.0 if untrained is None else 0.25)
    loop = Loop(remedies=remedies)
    loop.run(2)
    loop.guard._recovery.scale(0.25, 0.0)
    loop.run(300)
    assert [record.fault for record in loop.records] == ["rate_still_high"] * cuts
    again = Loop(remedies=remedies)
    again.guard._recovery.load_state_dict(loop.guard._recovery.state_dict())
    assert again.guard._recovery.state_dict() == loop.guard._recovery.state_dict()
