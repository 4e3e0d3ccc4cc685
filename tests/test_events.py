"""The former module of the types."""

from __future__ import annotations

from lightning_nanguard import events, types


def test_the_former_name_gives_the_same_classes() -> None:
    """Code written for version 0.1.0 imports the same classes by the former name."""
    for name in ("Fault", "Finding", "Intervention", "Reading", "Skip", "Restore", "Scale", "Clip", "Stop"):
        assert getattr(events, name) is getattr(types, name)
