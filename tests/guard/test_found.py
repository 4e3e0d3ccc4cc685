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


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (FoundFault(Fault("mine", "batch", "loss"), Reading(9, 0, 2.0, 3.0)), 9),
        (FoundFault(Fault("mine", "learner", "loss"), Reading(9, 0, 2.0, 3.0), reached=True), 9),
        (FoundFault(Fault("mine", "state", "gradient", 1e9), Reading(9, 0, 2.0, 3.0)), 5),
        (FoundFault(Fault("mine", "state", "parameter a"), Reading(9, 0, 2.0, 3.0)), None),
    ],
    ids=["batch", "reached", "earlier gradient", "state"],
)
def test_which_update_is_not_made_again(found: FoundFault, number: int | None) -> None:
    """Neither that of a bad batch, nor the one whose gradient has spoiled the state: any after the restored one."""
    reading = found.not_again(4)
    assert (None if reading is None else reading.step) == number
    if number == 5:
        assert reading is not None
        assert reading.grad_norm == 1e9
