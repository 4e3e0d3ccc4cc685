"""The last good state is restored."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault, Rollback
from lightning_nanguard.types import Evidence, Restore
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("attempt", "depth"), [(0, 0), (1, 0), (2, 1), (7, 6)])
def test_each_further_attempt_goes_deeper(attempt: int, depth: int) -> None:
    """The newest snapshot is tried twice, since the first attempt came with no other correction."""
    step = Rollback().propose(Fault("mine", "learner", "loss"), Evidence(step=9), attempt)
    assert step == Restore(depth)
    run = RunControl()
    Rollback().apply(Restore(depth), run)
    assert run.done == [("restore", depth)]
