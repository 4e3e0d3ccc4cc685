"""Copies of gradients; that a run goes on without them where memory is short is in test_memory_short.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_nanguard.trainer.repeat.gradients import give_gradients, gradients_if_room, gradients_of


def test_copies_of_gradients(tmp_path: Path) -> None:
    """None for a parameter without one."""
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    one.grad = torch.ones(1)
    copies = gradients_of([one, other])
    assert gradients_if_room([one, other]) == copies
    one.grad.fill_(2.0)
    assert copies[1] is None
    assert float(copies[0]) == 1.0
    other.grad = torch.ones(1)
    give_gradients([one, other], copies)
    assert one.grad is copies[0]
    assert other.grad is None
