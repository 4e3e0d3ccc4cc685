"""The optimizer's state is emptied."""

from __future__ import annotations

from lightning_nanguard import Fault, ResetMoments
from lightning_nanguard.types import DropMoments, Evidence
from tests.act.run_control import RunControl


def test_it_waits_for_the_second_attempt() -> None:
    """Moments are worth keeping where a restore is enough."""
    fault = Fault("mine", "learner", "loss")
    steps = [ResetMoments().propose(fault, Evidence(step=9), attempt) for attempt in range(3)]
    assert steps == [None, DropMoments(), DropMoments()]
    run = RunControl()
    ResetMoments().apply(DropMoments(), run)
    assert run.done == [("drop moments",)]
