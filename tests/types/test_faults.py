"""What is measured and found stays as it is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from lightning_nanguard.types import Fault


def test_a_fault_cannot_be_changed() -> None:
    """Once found, what was found stands."""
    fault = Fault("odd", "batch", "loss")
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'kind'"):
        fault.kind = "even"  # type: ignore[misc]
