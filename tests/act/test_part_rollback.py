"""The part of the state that went bad alone is restored."""

from __future__ import annotations

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.act.part_rollback import PartRollback
from lightning_nanguard.types import Evidence, RestorePart
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("part", "step"), [("averages", RestorePart()), ("state", RestorePart()), ("", None)])
def test_a_part_is_restored_where_it_alone_is_bad(part: str, step: RestorePart | None) -> None:
    """It proposes nothing where weights are bad, and otherwise restores that part whatever the attempt is."""
    evidence = Evidence(step=9, bad_part=part)  # type: ignore[arg-type]
    assert PartRollback().propose(Fault("mine", "state", "loss"), evidence, 3) == step
    run = RunControl()
    PartRollback().apply(RestorePart(), run)
    assert run.done == [("restore part",)]
