"""States that are exchanged: the same bits as a capture and a restore, at the cost of a copy."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from lightning_nanguard.state import switch as switch_module
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import capture
from lightning_nanguard.state.switch import StateSwitch
from tests.helpers import copied, same_bits
from tests.state.nets import OPTIMIZERS, everything, made, train


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "in mid-run"])
def test_two_states_take_turns(name: str, before: int) -> None:
    """Two branches that are trained in turn end as each does alone, bit by bit, whatever the optimizer keeps."""
    net, optimizer, learner = made(name)
    train(net, optimizer, before, seed=1)
    start, ends = capture(learner, step=0, global_step=0), []
    for seed in (10, 20):
        restore(learner, start)
        for step in range(4):
            train(net, optimizer, 1, seed=seed + step)
        ends.append(copied(everything(net, optimizer)))
    restore(learner, start)
    switch = StateSwitch(learner)
    states = [switch.store(0), switch.store(0)]
    for step in range(4):
        for number, seed in enumerate((10, 20)):
            switch.restore(states[number])
            train(net, optimizer, 1, seed=seed + step)
            switch.changed()
            states[number] = switch.store(step, states[number])
    for state, end in zip(states, ends, strict=True):
        switch.restore(state)
        assert same_bits(everything(net, optimizer), end)


def test_only_tensors_are_copied_while_the_learner_stays_the_same() -> None:
    """Neither the leaves nor their names are gone through again; the memory is the same."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 2, seed=1)
    switch = StateSwitch(learner)
    state, then = switch.store(2), copied(everything(net, optimizer))
    train(net, optimizer, 2, seed=2)
    switch.changed()
    with patch.object(switch_module, "capture") as captured, patch.object(switch_module, "restore") as restored:
        assert switch.store(4, state) is state
        assert not captured.called
        train(net, optimizer, 2, seed=3)
        switch.changed()
        switch.restore(state)
        assert not restored.called
    assert state.step == 4
    assert not same_bits(everything(net, optimizer), then)


def test_a_tensor_that_was_replaced_is_found() -> None:
    """Where a step binds a buffer or a moment to another tensor, or changes its kind, the state is copied with care."""
    net, optimizer, learner = made("adam")
    train(net, optimizer, 2, seed=1)
    switch = StateSwitch(learner)
    state, then = switch.store(2), copied(everything(net, optimizer))
    weight = net.last.weight
    optimizer.state[weight]["exp_avg"] = torch.ones_like(weight)
    net.count = torch.tensor(7.0)
    switch.changed()
    switch.restore(state)
    assert same_bits(everything(net, optimizer), then)
    net.count.data = torch.ones(3)
    later = switch.store(3, state)
    assert torch.equal(later.leaves["buffer", "count"], torch.ones(3))


def test_weights_alone() -> None:
    """For a loss only weights and buffers are restored, also where the optimizer had no state yet."""
    net, optimizer, learner = made("adam")
    switch = StateSwitch(learner)
    start, weights = switch.store(0), copied(dict(net.state_dict()))
    train(net, optimizer, 2, seed=1)
    moments = copied(optimizer.state_dict()["state"])
    for rebound in (False, True):
        if rebound:
            net.count = torch.tensor(7.0)
        with torch.no_grad():
            net.last.weight.add_(1.0)
        switch.restore_weights(start)
        assert same_bits(dict(net.state_dict()), weights)
        assert float(net.count) == 0.0
        assert same_bits(optimizer.state_dict()["state"], moments)
