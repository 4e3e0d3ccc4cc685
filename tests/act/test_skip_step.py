"""A bad batch is skipped by the policy, not by a proposal."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault, SkipStep
from lightning_nanguard.types import Evidence, Scope, Skip
from tests.act.run_control import RunControl


@pytest.mark.parametrize("scope", ["batch", "learner", "state"])
def test_it_proposes_nothing(scope: Scope) -> None:
    """What a skip can help was skipped before remedies are asked, at whatever attempt."""
    assert [SkipStep().propose(Fault("mine", scope, "loss"), Evidence(step=3), attempt) for attempt in range(3)] == [
        None
    ] * 3


def test_it_undoes_what_the_batch_touched() -> None:
    """The update itself was kept from the weights already."""
    run = RunControl()
    SkipStep().apply(Skip(), run)
    assert run.done == [("skip",)]
