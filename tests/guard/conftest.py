from __future__ import annotations

import pytest

from lightning_nanguard.measure.readings import PendingReading


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings arrive as late as they may, as from a device that is far behind."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)
