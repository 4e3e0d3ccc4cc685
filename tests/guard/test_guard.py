"""The order of a step, in a plain loop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import Budget, Detector, Fault, Reading, TrainingDivergedError
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from tests.guard.plain_loop import EVIDENCE, PlainLoop, is_finite, nan_at, remedies, state
from tests.helpers import copied, differences


@pytest.mark.parametrize(
    "settings",
    [
        Settings(snapshot_every=3),
        Settings(snapshot_every=3, deferred=True),
        Settings(snapshot_every=3, observe=True),
        Settings(snapshot_every=3, deferred=True, observe=True),
    ],
    ids=["step", "deferred", "observe", "deferred and observe"],
)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_healthy_run_is_the_same_with_a_guard(settings: Settings, fused: bool) -> None:
    """Weights, moments, gradients and random numbers are bit by bit those of the loop without a guard."""
    ends = []
    for guarded in (False, True):
        torch.manual_seed(0)
        loop = PlainLoop(settings=settings, fused=fused)
        if not guarded:
            for call in ("start", "open_batch", "see_loss", "before_step", "close_batch", "flush"):
                setattr(loop.guard, call, lambda *_: None)
        loop.run(20)
        ends.append(copied(state(loop)))
        assert loop.records == []
    assert differences(*ends) == []


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "deferred"])
def test_a_bad_batch_leaves_finite_weights(deferred: bool) -> None:
    """In step readback the batch is skipped, in deferred readback undone within two steps."""
    loop = PlainLoop(settings=Settings(snapshot_every=4, deferred=deferred))
    loop.run(30, nan_at(12))
    assert is_finite(loop)
    (record,) = loop.records
    assert record.remedies == (("restore",) if deferred else ("skip",))
    assert record.global_step <= 13 + 2 * deferred
    assert loop.guard.context.rate.multiplier == 1.0
    assert loop.probe() is not None


@pytest.mark.parametrize(("deferred", "fused"), [(False, False), (False, True), (True, True)])
def test_a_skip_is_bitwise(deferred: bool, fused: bool) -> None:
    """Skipped before the step, or on the device by a fused optimizer, the batch might as well not have been there."""
    ends = []
    for spoil, without in ((nan_at(12), None), (nan_at(), 12)):
        torch.manual_seed(0)
        loop = PlainLoop(settings=Settings(snapshot_every=4, deferred=deferred), fused=fused)
        loop.run(30, spoil, without)
        moments = [entry["momentum_buffer"] for entry in loop.optimizer.state.values()]
        ends.append([*loop.net.parameters(), *moments])
        assert remedies(loop) == ([] if without else [("skip",)])
    assert differences(*ends) == []


def test_the_first_batch_may_be_bad() -> None:
    """A bad first batch is skipped, and the run starts with the second."""
    loop = PlainLoop()
    loop.run(20, nan_at(0))
    assert is_finite(loop)
    assert remedies(loop) == [("skip",)]


def test_a_run_that_never_was_good_ends_soon() -> None:
    """All batches bad from the first: an error that says so, within a bounded number of steps."""
    loop = PlainLoop(budget=Budget(max_bad_batches=12))
    with pytest.raises(TrainingDivergedError, match="no update was ever good: the first 12 were all bad"):
        loop.run(100, nan_at(*range(100)))
    assert loop.step == 12


def test_a_weight_that_goes_bad_by_itself_is_put_back() -> None:
    """Only the state is restored: the rate stays."""
    loop = PlainLoop()
    loop.run(20)
    with torch.no_grad():
        loop.net.weight[0, 1] = math.inf
    loop.run(20)
    assert is_finite(loop)
    assert remedies(loop) == [("restore",)]
    assert loop.records[0].place == "parameter weight"
    assert loop.records[0].cause == "corrupted_state"
    assert loop.guard.context.rate.multiplier == 1.0


def test_a_rate_far_too_high_is_cut_until_the_run_learns() -> None:
    """A linear layer that diverges at its rate ends learning at a lower one."""
    loop = PlainLoop(lr=100.0)
    loop.run(200)
    assert loop.guard.context.rate.multiplier < 0.1
    last = loop.probe()
    assert last is not None
    assert last < 0.01


def test_a_resumed_guard_goes_on() -> None:
    """Counts, budgets and windows survive a checkpoint."""
    loop = PlainLoop()
    loop.run(40, nan_at(25))
    other = PlainLoop()
    other.guard.load_state_dict(loop.guard.state_dict())
    assert other.guard.state_dict() == loop.guard.state_dict()
    assert other.guard.updates == 40
    assert other.guard.non_finite == 1


def test_a_batch_without_an_update_leaves_nothing_waiting() -> None:
    """Losses of batches that no guarded optimizer steps on are not kept."""
    loop = PlainLoop()
    loop.guard.start()
    for _ in range(50):
        loop.guard.open_batch()
        loop.guard.see_loss(torch.tensor(1.0))
        loop.guard.close_batch()
    assert not loop.guard.in_window
    assert loop.guard._parts.meter.measure_now(1, 0) is None


def test_only_the_optimizer_with_the_bad_gradient_is_skipped() -> None:
    """Of two optimizers in a batch, that with finite gradients makes its step."""
    loop = PlainLoop(net=lambda: nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in loop.net]
    guard = guard_for(loop.net, optimizers, loop)
    guard.start()
    for step in range(6):
        before = copied(loop.net.state_dict())
        batch = torch.randn(8, 3)
        guard.open_batch()
        for index, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            loss = loop.net[index](batch).square().mean()
            guard.see_loss(loss)
            loss.backward()
            if (step, index) == (4, 1):
                loop.net[1].weight.grad[0, 2] = math.nan
            guard.before_step(index)
            optimizer.step()
        loop.step += 1
        guard.close_batch()
        moved = {name[0] for name, tensor in loop.net.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == ({"0"} if step == 4 else {"0", "1"})
    assert remedies(loop) == [("skip",)]
    assert loop.records[0].place == "gradient of 1.weight"


class Counted(nn.Linear):
    """A layer that counts in a buffer, and has running statistics that it never uses."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize("place", ["norm.running_mean", "weight"])
def test_a_batch_broken_off_is_undone_where_that_is_enough(place: str) -> None:
    """Within a batch, a check first undoes what the batch changed, and goes back to a snapshot only if that does not
    help."""
    loop = PlainLoop(net=Counted)
    loop.run(20)
    loop.guard.open_batch()
    with torch.no_grad():
        loop.net.get_parameter("weight")[0, 0] += 1.0
        dict(loop.net.state_dict())[place].view(-1)[0] = math.nan
    loop.guard.check()
    assert is_finite(loop)
    assert remedies(loop) == [("restore",) if place == "weight" else ("undo",)]
    assert float(loop.net.seen) == (16.0 if place == "weight" else 20.0)


def test_the_state_is_looked_at_before_the_end() -> None:
    """A weight that went bad after the last update is put back by ``finish``, one far out of range too."""
    for value in (math.nan, 1e9):
        loop = PlainLoop()
        loop.run(200)
        with torch.no_grad():
            loop.net.weight[0, 1] = value
        loop.guard.finish()
        assert remedies(loop) == [("restore",)]
        assert abs(float(loop.net.weight[0, 1].detach())) < 10.0


def test_close_lets_go_of_everything() -> None:
    """Afterwards the optimizer has its own rate and no hook of the guard, and no snapshot is held."""
    loop = PlainLoop()
    hooks = len(loop.optimizer._optimizer_step_pre_hooks)
    loop.run(10)
    loop.guard.context.rate.set_multiplier(0.5)
    loop.guard.close()
    assert loop.optimizer.param_groups[0]["lr"] == 0.1
    assert len(loop.optimizer._optimizer_step_pre_hooks) == hooks
    assert loop.guard.context.ring.certified == []
    assert loop.guard.context.ring.pending is None


class FindsAt(Detector):
    """Finds a fault at one step."""

    def __init__(self, step: int, fault: Fault) -> None:
        self.step = step
        self.fault = fault

    def check(self, reading: Reading) -> Fault | None:
        return self.fault if reading.step == self.step else None


def trained(detectors: list[Detector], without: int | None = None) -> dict[str, object]:
    """What a run of 20 batches leaves."""
    torch.manual_seed(0)
    loop = PlainLoop(settings=EVIDENCE, detectors=detectors)
    loop.run(20, without=without)
    return copied({key: value for key, value in state(loop).items() if key != "gradients"})


def test_the_update_of_a_suspicion_is_made() -> None:
    """It is finite, and most suspicions are none: the run is bit by bit as without the detector. That of a bad batch
    is not made."""
    suspicion = Fault("mine", "learner", "loss", 1.0, certain=False)
    assert differences(trained([FindsAt(13, suspicion)]), trained([])) == []
    assert differences(trained([FindsAt(13, Fault("mine", "batch", "loss"))]), trained([], without=12)) == []


class Strange(PlainLoop):
    """Says of every batch whether it is out of the ordinary."""

    answer: bool | None = None

    def batch_strange(self, *, extreme: bool = False) -> bool | None:
        return self.answer


@pytest.mark.parametrize(("strange", "done"), [(True, [("skip",)]), (False, []), (None, [])])
def test_a_doubtful_fault_needs_a_strange_batch(strange: bool | None, done: list[tuple[str, ...]]) -> None:
    """Where the batch is like others, or that cannot be told, the reading is a healthy one."""
    doubtful = Fault("mine", "batch", "gradient", 1.0, doubtful=True, certain=False)
    loop = Strange(settings=EVIDENCE, detectors=[FindsAt(13, doubtful)])
    loop.answer = strange
    loop.run(20)
    assert remedies(loop) == done
    assert loop.guard.context.state.healthy_steps == 20 - len(done)


@pytest.mark.parametrize(("deferred", "place"), [(False, "gradient of bias"), (True, "gradient")])
def test_a_bad_gradient_is_named_while_it_is_there(deferred: bool, place: str) -> None:
    """By its parameter; a reading that came late is of gradients that are gone."""
    loop = PlainLoop(settings=Settings(snapshot_every=4, deferred=deferred))
    loop.net.bias.register_hook(lambda gradient: gradient * (math.nan if loop.step == 12 else 1.0))
    loop.run(20)
    assert [record.place for record in loop.records] == [place]
    assert loop.guard.non_finite == 1


class Scaled(PlainLoop):
    """Trains with a GradScaler; the gradient of one step overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.guard.context.learner.scaler = self.scaler

    def train(self, batch: Tensor) -> None:
        self.batch = batch
        self.guard.open_batch()
        self.optimizer.zero_grad()
        loss = self.scaler.scale(self.loss())
        self.guard.see_loss(loss)
        loss.backward()
        if self.step == 12:
            self.net.weight.grad.fill_(math.inf)
        self.scaler.unscale_(self.optimizer)
        self.guard.before_step(0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.guard.close_batch()


def test_an_overflow_is_left_to_the_scaler() -> None:
    """It skips the step by itself: no fault, no healthy update either, and it does not count as one that was not
    finite."""
    loop = Scaled()
    loop.run(20)
    assert loop.records == []
    assert loop.guard.non_finite == 0
    assert loop.guard.context.state.healthy_steps == 19
    assert loop.scaler.get_scale() == 512.0


class Normalised(PlainLoop):
    """Behind batch norm a batch however large is one like any other in the loss."""

    def __init__(self) -> None:
        net = lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))  # noqa: E731
        super().__init__(net=net, lr=0.01, settings=replace(EVIDENCE, observe=True))

    def loss(self) -> Tensor:
        return self.net(self.batch).square().mean()


def test_an_observed_batch_that_spoils_statistics_is_not_blocked() -> None:
    """It is on record, and the run is bit by bit as without a guard."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        loop = Normalised()
        if not watched:
            loop.guard.before_step = lambda index: None
        loop.run(150, lambda step, batch: batch.mul_({120: 1e5, 140: 1e9}.get(step, 1.0)))
        ends.append(copied(state(loop)))
    assert differences(*ends) == []
    assert not any(record.applied for record in loop.records)
    assert {"implausible_state", "implausible_statistics"} <= {record.fault for record in loop.records}


def test_a_guard_that_is_loaded_is_the_guard_that_was_saved() -> None:
    """Rates, blame, spoiled statistics, caution and what was tried come back, from plain containers."""
    loop = PlainLoop()
    loop.run(30, nan_at(12, 20))
    parts = loop.guard._parts
    parts.plausibility.watches_statistics = True
    parts.plausibility._jumps["parameter weight"] += 2
    parts.caution._never_late = True
    parts.recovery._tried = True
    loop.guard.context.state.rates.append((30, 0.5))
    saved = loop.guard.state_dict()
    assert saved["rates"][-1] == [30, 0.5]
    assert saved["blamed_batches"] == [["non_finite_loss", "loss", 2]]
    assert saved["plausibility"] == {
        "jumps": {"parameter weight": 2},
        "watches_statistics": True,
        "watched_buffers": [],
    }
    assert len(saved["recorder"]["tried"]) == 2
    other = PlainLoop()
    other.guard.load_state_dict(json.loads(json.dumps(saved)))
    assert other.guard.state_dict() == json.loads(json.dumps(saved))


def test_a_step_that_is_skipped_without_a_fault_is_undone_at_once() -> None:
    """An optimizer of another package moves weights without a gradient. The copy that undoes this is of this batch: a
    fault many updates later does not bring the old weights back."""

    class Drifts(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.999)

    loop = PlainLoop()
    loop.optimizer = Drifts(loop.net.parameters(), lr=0.01)
    loop.guard = guard_for(loop.net, [loop.optimizer], loop, replay=loop, settings=Settings(snapshot_every=4))
    loop.run(6)
    before = loop.net.weight.clone()
    loop.guard.context.state.passed_over = True  # every sample of the batch is known to be bad
    loop.train(torch.randn(8, 3))
    assert torch.equal(loop.net.weight, before)
    loop.run(20)
    before = loop.net.weight.clone()
    loop.train(torch.full((8, 3), math.nan))
    assert torch.equal(loop.net.weight, before)
    assert [record.remedies for record in loop.records] == [("skip",)]
