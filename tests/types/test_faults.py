"""What is measured and found stays as it is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from lightning_nanguard.types import Fault, Reading


def test_a_reading_knows_its_former_name() -> None:
    """A detector written for version 0.1.0 reads the optimizer's index as ``stream``."""
    assert Reading(4, 1, 0.5, None).stream == 1


def test_a_fault_cannot_be_changed() -> None:
    """Once found, what was found stands."""
    fault = Fault("odd", "batch", "loss")
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'kind'"):
        fault.kind = "even"  # type: ignore[misc]
