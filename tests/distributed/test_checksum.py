"""Checksums of the learner's state."""

from __future__ import annotations

import torch

from lightning_nanguard.distributed.checksum import checksums, is_replicated
from lightning_nanguard.measure.checksum import checksum


def test_only_what_all_ranks_hold_counts() -> None:
    """Parameters and optimizer state have a sum each; buffers, averaged copies and plain numbers count in none."""
    leaves = {
        ("parameter", "w"): torch.ones(3),
        ("optimizer", 0, "exp_avg"): torch.zeros(3),
        ("optimizer", 0, "step"): 3,
        ("buffer", "mean"): torch.full((3,), 2.0),
    }
    assert [key for key, leaf in leaves.items() if is_replicated(key, leaf)] == list(leaves)[:2]
    assert checksums(leaves) == (checksum([torch.ones(3)]), checksum([torch.zeros(3)]))
