"""A loss scale that went bad alone is restored."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Fault
from lightning_nanguard.act.scale_rollback import ScaleRollback
from lightning_nanguard.types import Evidence, RestoreScale
from tests.act.run_control import RunControl


@pytest.mark.parametrize(("alone", "step"), [("scale", RestoreScale()), ("averages", None), (None, None)])
def test_the_scale_is_restored_where_it_alone_is_bad(alone: Any, step: RestoreScale | None) -> None:
    """It proposes nothing where more is bad."""
    evidence = Evidence(step=9, alone=alone)
    assert ScaleRollback().propose(Fault("mine", "state", "scale"), evidence, 3) == step
    run = RunControl()
    ScaleRollback().apply(RestoreScale(), run)
    assert run.done == [("restore scale",)]
