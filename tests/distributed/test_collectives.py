"""Collectives of the default group are counted, and forbidden in code that one rank runs without the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nanguard.distributed.collectives import ForbidCollectives, collectives_begun


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


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo")
def test_a_collective_raises_before_it_starts(tmp_path: Path) -> None:
    """A rank that runs a batch again leaves no other rank waiting; other operations run."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with ForbidCollectives():
            assert float(torch.ones(2).sum()) == 2.0
        with pytest.raises(RuntimeError, match="while a batch is run again on one rank"), ForbidCollectives():
            torch.distributed.all_reduce(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
