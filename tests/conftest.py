from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A property holds however slow the machine is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from one thread, one seed and one import path, in a folder of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The commands add the folder of a user's file to the import path.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


class _Errors(logging.Handler):
    """Keeps the error messages of the guard."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def _guard_never_fails(request: pytest.FixtureRequest) -> Iterator[None]:
    """An error inside the guard ends no run, so it has to be looked for."""
    logger, errors = logging.getLogger("lightning_nanguard"), _Errors()
    logger.addHandler(errors)
    yield
    logger.removeHandler(errors)
    if request.node.get_closest_marker("failing_guard") is None:
        assert [one for one in errors.messages if "the guard failed" in one] == []


@pytest.fixture
def own_folder() -> None:
    """Records of a run without a logger's folder lie in the working directory, which is the test's own."""
