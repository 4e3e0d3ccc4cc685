from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from one thread and one seed, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
