"""The order of a step, in a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import Budget, TrainingDivergedError
from lightning_nanguard.guard.build import guard_for
from lightning_nanguard.guard.context import Settings
from tests.guard.plain_loop import PlainLoop, is_finite, nan_at, remedies, state
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


def test_non_finite_weights_at_the_start_are_named() -> None:
    """A guard does not start from NaN."""
    loop = PlainLoop()
    with torch.no_grad():
        loop.net.bias[0] = math.nan
    with pytest.raises(TrainingDivergedError, match="parameter bias holds NaN or Inf before the first update"):
        loop.run(1)


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
    assert loop.guard._parts.meter.losses == []


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
    """A layer that counts in a buffer."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize("place", ["seen", "weight"])
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
    assert remedies(loop) == [("undo",) if place == "seen" else ("restore",)]
    assert float(loop.net.seen) == (20.0 if place == "seen" else 16.0)


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
