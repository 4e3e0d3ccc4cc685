"""The last good state is restored, or the part of the state that went bad alone."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Fault, Rollback
from lightning_nanguard.act.rollback import AverageRollback, ScaleRollback
from lightning_nanguard.types import Evidence, Restore, RestoreAverages, RestoreScale
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("attempt", "depth"), [(0, 0), (1, 0), (2, 1), (7, 6)])
def test_each_further_attempt_goes_deeper(attempt: int, depth: int) -> None:
    """The newest snapshot is tried twice, since the first attempt came with no other correction."""
    step = Rollback().propose(Fault("mine", "learner", "loss"), Evidence(step=9), attempt)
    assert step == Restore(depth)
    run = RunControl()
    Rollback().apply(Restore(depth), run)
    assert run.done == [("restore", depth)]


@pytest.mark.parametrize(("alone", "step"), [("averages", RestoreAverages()), ("scale", None), (None, None)])
def test_averages_are_restored_where_they_alone_are_bad(alone: Any, step: RestoreAverages | None) -> None:
    """It proposes nothing where more is bad, and otherwise restores them whatever the attempt is."""
    evidence = Evidence(step=9, alone=alone)
    assert AverageRollback().propose(Fault("mine", "state", "loss"), evidence, 3) == step
    run = RunControl()
    AverageRollback().apply(RestoreAverages(), run)
    assert run.done == [("restore averages",)]


@pytest.mark.parametrize(("alone", "step"), [("scale", RestoreScale()), ("averages", None), (None, None)])
def test_the_scale_is_restored_where_it_alone_is_bad(alone: Any, step: RestoreScale | None) -> None:
    """It proposes nothing where more is bad."""
    evidence = Evidence(step=9, alone=alone)
    assert ScaleRollback().propose(Fault("mine", "state", "scale"), evidence, 3) == step
    run = RunControl()
    ScaleRollback().apply(RestoreScale(), run)
    assert run.done == [("restore scale",)]
