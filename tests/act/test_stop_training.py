"""The run is ended."""

from __future__ import annotations

from lightning_nanguard import Fault, StopTraining
from lightning_nanguard.types import Evidence, Stop
from tests.act.run_control import RunControl


def test_it_asks_to_stop_and_touches_nothing() -> None:
    """At the first attempt, whatever the evidence; the guard restores the good weights and raises."""
    step = StopTraining().propose(Fault("mine", "learner", "loss"), Evidence(step=9), 0)
    assert isinstance(step, Stop)
    assert "StopTraining is listed" in step.reason
    run = RunControl()
    StopTraining().apply(step, run)
    assert run.done == []
