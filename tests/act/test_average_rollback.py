"""The part of the state that went bad alone is restored."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.act.average_rollback import AverageRollback
from lightning_nanguard.types import Evidence, RestoreAverages
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("alone", "step"), [(True, RestoreAverages()), (False, None)])
def test_averages_are_restored_where_they_alone_are_bad(alone: bool, step: RestoreAverages | None) -> None:
    """It proposes nothing where more is bad, and otherwise restores them whatever the attempt is."""
    evidence = Evidence(step=9, averages_alone=alone)
    assert AverageRollback().propose(Fault("mine", "state", "loss"), evidence, 3) == step
    run = RunControl()
    AverageRollback().apply(RestoreAverages(), run)
    assert run.done == [("restore averages",)]
