from __future__ import annotations

import sys
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


@pytest.fixture
def own_folder() -> None:
    """Records of a run without a logger's folder lie in the working directory, which is the test's own."""
