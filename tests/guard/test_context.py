"""What the parts of one guard share."""

from __future__ import annotations

import pytest

from tests.guard.memory_ranks import memory_ranks
from tests.guard.plain_loop import PlainLoop


@pytest.mark.parametrize(("world", "many"), [(1, False), (2, True)])
def test_many_is_more_than_one_process(world: int, many: bool) -> None:
    """Only then has the guard anybody to agree with."""
    assert PlainLoop(ranks=memory_ranks(world)[0]).guard.context.many is many


def test_two_guards_share_nothing() -> None:
    """Snapshots, counts and clipping of one run are not another's."""
    one, other = PlainLoop(), PlainLoop()
    one.run(8)
    one.guard.context.clipper.set(1.0, "norm")
    assert other.guard.context.ring.certified == []
    assert other.guard.context.state.step == 0
    assert other.guard.context.clipper.value is None
