"""A branch takes the batches of the run beside it, and leaves no trace."""

from __future__ import annotations

import torch

from lightning_nanguard.diagnosis.step_tracer import StepTrace
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.state.snapshot import Snapshot
from tests.guard.branching import BranchingLoop, branches
from tests.guard.plain_loop import PlainLoop, state
from tests.helpers import copied, differences


def weights(snapshot: Snapshot) -> list[torch.Tensor]:
    """The weights that a snapshot holds."""
    return [leaf for key, leaf in snapshot.leaves.items() if key[0] == "parameter"]


def test_a_branch_makes_the_updates_that_the_run_would_make() -> None:
    """A branch of the present state that takes the same batches stays equal to the run bit by bit, and the run to one
    without a branch; a branch at half the rate does not."""
    loop, alone = BranchingLoop(lr=0.05), BranchingLoop(lr=0.05)
    loop.run(20)
    alone.run(20)
    beside = branches(loop)
    with beside.beside():
        equal, slower = beside.of(), beside.of(factor=0.5)
    assert equal is not None
    assert slower is not None
    for batch in torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(2)):
        loop.batch = batch
        with beside.beside():
            assert all(beside.train(one) is not None for one in (equal, slower))
        loop.train(batch)
        alone.train(batch)
    assert differences(copied(state(loop)), copied(state(alone))) == []
    with beside.beside():
        now = beside.of()
    assert now is not None
    assert all(torch.equal(one, other) for one, other in zip(weights(equal.state), weights(now.state), strict=True))
    assert not torch.equal(weights(slower.state)[0], weights(now.state)[0])


def test_a_branch_of_an_earlier_state_can_be_gone_on_from() -> None:
    """The run takes the weights, the rate and the clipping of the branch."""
    loop = BranchingLoop(lr=0.05)
    loop.run(20)
    context = loop.guard.context
    start = context.ring.certified[-1]
    beside = branches(loop)
    before = copied(state(loop))
    with beside.beside():
        branch = beside.of(start, 0.25)
        assert beside.loss(start) != beside.loss(context.ring.certified[0])
    assert branch is not None
    assert differences(copied(state(loop)), before) == []
    context.clipper.set(1.0, "norm")
    beside.take(branch)
    assert torch.equal(loop.net.weight, start.leaves["parameter", "weight"])
    assert context.rate.ratio() == 0.25
    assert context.clipper.value is None


def test_where_no_branch_is_possible() -> None:
    """A loop that cannot run batches again, and one that only observes, have none, which is said in words."""
    assert branches(PlainLoop()).hindrance() == "the batches of this run cannot be run again"
    watched = BranchingLoop(lr=0.05, settings=Settings(observe=True))
    assert branches(watched).hindrance() == "the guard only observes"
    assert branches(BranchingLoop(lr=0.05)).hindrance() == ""


def test_what_is_known_of_it_without_a_run() -> None:
    """Whether a loss depends on samples of the model is found out by running a batch, and only if that is allowed."""
    loop = BranchingLoop(lr=0.05)
    asked: list[bool] = []

    def step_trace() -> StepTrace:
        asked.append(True)
        return StepTrace(own_targets=True, writes=False, unused=frozenset())

    loop.step_trace = step_trace  # type: ignore[method-assign]
    assert branches(loop).hindrance(run=False) == ""
    assert not asked
    assert "the model itself makes without a gradient" in branches(loop).hindrance()
