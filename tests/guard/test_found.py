"""A fault that waits for the end of its batch."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from lightning_nanguard import Fault, Reading
from lightning_nanguard.guard.found import FoundFault


def test_a_fault_found_outside_a_batch() -> None:
    """There is nothing to undo, no update reached the weights, and all ranks saw it; none of it can be changed."""
    found = FoundFault(Fault("mine", "state", "loss"), Reading(3, 0, None, None))
    assert (found.undo, found.reached, found.late, found.ranks) == (None, False, False, ())
    with pytest.raises(FrozenInstanceError, match="reached"):
        found.reached = True  # type: ignore[misc]
