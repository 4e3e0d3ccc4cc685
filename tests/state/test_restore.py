"""Restoring: bitwise, in place, repeatable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard.state.finite import FiniteCheck
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import average_of, bad_averages, mend_averages, restore
from lightning_nanguard.state.snapshot import capture
from tests.helpers import copied, same_bits
from tests.state.nets import OPTIMIZERS, Net, everything, made, train


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "in mid-run"])
def test_a_restore_is_bitwise_and_repeatable(name: str, before: int) -> None:
    """Going back twice to one snapshot gives the same bits, and training on from it the same run."""
    net, optimizer, learner = made(name)
    train(net, optimizer, before, seed=1)
    snapshot = capture(learner, step=before, global_step=before)
    then = copied(everything(net, optimizer))
    ends = []
    for _ in range(2):
        train(net, optimizer, 4, seed=2)
        ends.append(copied(everything(net, optimizer)))
        restore(learner, snapshot)
        assert same_bits(everything(net, optimizer), then)
    assert same_bits(ends[0], ends[1])


def test_a_restore_is_in_place() -> None:
    """Tensors keep their identity, so whoever holds them sees the state gone back to."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 2, seed=1)
    snapshot = capture(learner, step=2, global_step=2)
    held = {id(tensor) for tensor in [*net.parameters(), *net.buffers()]}
    moments = {id(value) for entry in optimizer.state.values() for value in entry.values()}
    train(net, optimizer, 2, seed=2)
    restore(learner, snapshot)
    assert held == {id(tensor) for tensor in [*net.parameters(), *net.buffers()]}
    assert moments == {id(value) for entry in optimizer.state.values() for value in entry.values()}


def test_rates_are_the_clocks() -> None:
    """A rollback leaves learning rates, and what else schedulers write, as they are; other keys of groups go."""
    _, optimizer, learner = made("sgd")
    snapshot = capture(learner, step=0, global_step=0)
    optimizer.param_groups[0].update(lr=0.01, momentum=0.5)
    optimizer.param_groups[0]["counted"] = 3
    restore(learner, snapshot)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert "counted" not in optimizer.param_groups[0]


def test_what_the_snapshot_lacks_is_left_alone() -> None:
    """A parameter added since stays as it is; optimizer state the snapshot lacks goes."""
    net, optimizer, learner = made("adam")
    snapshot = capture(learner, step=0, global_step=0)
    train(net, optimizer, 1, seed=1)
    net.added = nn.Linear(2, 2)
    added = net.added.weight.detach().clone()
    restore(learner, snapshot)
    assert torch.equal(net.added.weight, added)
    assert not optimizer.state


def test_only_the_keys_asked_for_are_restored() -> None:
    """With ``keep`` all other leaves stay as they are."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 1, seed=1)
    snapshot = capture(learner, step=1, global_step=1)
    before = copied(everything(net, optimizer))
    train(net, optimizer, 2, seed=2)
    now = copied(everything(net, optimizer))
    restore(learner, snapshot, keep=lambda key: key[0] == "parameter")
    after = everything(net, optimizer)
    assert same_bits(after["weights"], before["weights"])
    assert same_bits([after["buffers"], after["state"]], [now["buffers"], now["state"]])


class Scaler:
    """A GradScaler's state."""

    def __init__(self, scale: float, tracker: int) -> None:
        self.state = {"scale": scale, "_growth_tracker": tracker}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = dict(state_dict)


@pytest.mark.parametrize(
    ("now", "after"), [(64.0, 64.0), (4096.0, 1024.0), (math.nan, 1024.0), (-math.inf, 1024.0), (1e-40, 1024.0)]
)
def test_the_scale_never_grows_by_a_rollback(now: float, after: float) -> None:
    """The growth tracker goes back, the scale only down, except from one that is not finite or has no inverse."""
    scaler = Scaler(1024.0, 7)
    learner = Learner(Net(), [], scaler)
    snapshot = capture(learner, step=0, global_step=0)
    scaler.state = {"scale": now, "_growth_tracker": 99}
    restore(learner, snapshot)
    assert scaler.state == {"scale": after, "_growth_tracker": 7}


class Sent:
    """Stands in for the event of a copy to the host that is under way."""

    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_copy_under_way_is_waited_for_before_it_is_used() -> None:
    """Going back to a snapshot waits for it to arrive, once."""
    _, _, learner = made("sgd")
    taken, sent = capture(learner, step=0, global_step=0), Sent()
    taken.done = [sent]
    restore(learner, taken)
    restore(learner, taken)
    assert sent.waited == 1


@pytest.mark.parametrize("several", [False, True], ids=["tensors", "lists of tensors"])
def test_what_was_moved_comes_back_to_its_device(several: bool) -> None:
    """A snapshot that lies elsewhere knows where the originals lay, also of what an optimizer has forgotten since."""
    net, optimizer, learner = made("lbfgs" if several else "adam")
    train(net, optimizer, 3, seed=1)
    taken = capture(learner, step=0, global_step=0, device=torch.device("cpu"))
    tensors = {key for key, leaf in taken.leaves.items() if isinstance(leaf, torch.Tensor)}
    assert set(taken.homes) >= tensors
    before = copied(optimizer.state_dict()["state"])
    assert before
    optimizer.state.clear()
    restore(learner, taken)
    assert same_bits(optimizer.state_dict()["state"], before)
    assert capture(learner, step=0, global_step=0).homes == {}


def test_a_corrupt_average_is_set_to_the_weights() -> None:
    """An averaged copy that no snapshot holds takes the weights' values where it is not finite; a sound one stays."""
    net = Net()
    copies = {
        owner: {"module.last.weight": torch.full_like(net.last.weight, value, requires_grad=False)}
        for owner, value in (("bad", math.nan), ("good", 3.0))
    }
    learner = Learner(net, [], averages=lambda: copies)
    mend_averages(learner, FiniteCheck().corrupt)
    assert torch.equal(copies["bad"]["module.last.weight"], net.last.weight)
    assert bool((copies["good"]["module.last.weight"] == 3.0).all())


def test_averaged_copies_are_restored_alone() -> None:
    """A bad copy comes back bitwise and as a whole; the other copy and all else stay."""
    net, optimizer, _ = made("adam")
    copies = {name: {f"module.{key}": one.detach().clone() for key, one in net.named_parameters()} for name in "ab"}
    learner = Learner(net, [optimizer], averages=lambda: copies)
    train(net, optimizer, 3, 0)
    taken = capture(learner, step=0, global_step=0)
    train(net, optimizer, 3, 1)
    for one in copies["b"].values():
        one += 1
    next(iter(copies["a"].values())).view(-1)[0] = math.inf
    before = dict(capture(learner, step=0, global_step=0).leaves)
    bad = bad_averages(learner.averages(), FiniteCheck().corrupt)
    assert bad == {("average", "a")}
    restore(learner, taken, keep=lambda key: average_of(key) in bad)
    for key, leaf in learner.leaves():
        assert same_bits(leaf, (taken.leaves if average_of(key) in bad else before)[key]), key
    assert bad_averages(learner.averages(), FiniteCheck().corrupt) == frozenset()


def test_the_order_of_the_state_is_restored() -> None:
    """A parameter that got its first gradient late has its state last, also after another state was tried."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(net.parameters())
    learner = Learner(net, [optimizer])
    start = capture(learner, step=0, global_step=0)
    for layers in (net[1], net):
        layers(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = optimizer.state_dict()
    now = capture(learner, step=2, global_step=2)
    restore(learner, start)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    restore(learner, now)
    assert list(optimizer.state_dict()["state"]) == list(before["state"]) == [2, 3, 0, 1]
