"""Collectives of the default group are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nanguard.distributed.collective_count import collectives_begun


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo")
def test_each_collective_is_counted(tmp_path: Path) -> None:
    """Each of them raises the count, and nothing else does; without a group the count is 0."""
    assert collectives_begun() == 0
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        begun = collectives_begun()
        torch.distributed.all_reduce(torch.ones(1))
        torch.distributed.barrier()
        assert collectives_begun() == begun + 2
        torch.ones(3).sum()
        assert collectives_begun() == begun + 2
    finally:
        torch.distributed.destroy_process_group()
