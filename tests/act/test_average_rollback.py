"""The part of the state that went bad alone is restored."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.act.average_rollback import AverageRollback
from lightning_nanguard.types import Evidence, RestoreAverages
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("alone", "step"), [("averages", RestoreAverages()), ("scale", None), (None, None)])
def test_averages_are_restored_where_they_alone_are_bad(alone: Any, step: RestoreAverages | None) -> None:
    """It proposes nothing where more is bad, and otherwise restores them whatever the attempt is."""
    evidence = Evidence(step=9, alone=alone)
    assert AverageRollback().propose(Fault("mine", "state", "loss"), evidence, 3) == step
    run = RunControl()
    AverageRollback().apply(RestoreAverages(), run)
    assert run.done == [("restore averages",)]
