"""What a step begins from, and steps that cannot be made again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard.state.random_state import RandomStreams
from lightning_nanguard.state.step_start import StepMemory


def test_a_step_begins_again_where_it_began() -> None:
    """Random numbers, attributes, and what the step has taken out of its batch."""
    module = nn.Linear(1, 1)
    module.seen = 0  # type: ignore[assignment]
    batch = {"x": torch.ones(1), "labels": torch.zeros(1), "more": [{"y": 1}]}
    held = dict(batch)
    memory, streams = StepMemory(module), RandomStreams(torch.device("cpu"))
    start = memory.open(batch, streams.open())

    def step() -> tuple[float, float]:
        module.seen += 1  # type: ignore[operator, assignment]
        del batch["labels"]
        batch["more"][0].clear()  # type: ignore[index, union-attr]
        return float(torch.rand(())), random.random()

    drawn = step()
    memory.close()
    start.restore()
    assert batch.keys() == held.keys()
    assert batch["more"] == [{"y": 1}]
    assert module.seen == 0
    assert step() == drawn
    clock = start.clock_now()
    assert clock.counted
    after = float(torch.rand(()))
    start.restore()
    clock.restore()
    assert (module.seen, float(torch.rand(()))) == (1, after)
    assert memory.repeatable


@pytest.mark.parametrize("writes", ["batch", "weight"])
def test_a_step_that_writes_into_what_it_begins_from_is_not_made_again(writes: str) -> None:
    """A batch scaled in place, or an average moved in the forward pass, would be another one the second time."""
    module = nn.Linear(1, 1)
    batch: Any = (torch.ones(1), [torch.ones(1)])
    memory, streams = StepMemory(module), RandomStreams(torch.device("cpu"))
    memory.open(batch, streams.open())
    with torch.no_grad():
        (batch[1][0] if writes == "batch" else module.weight).mul_(2)
    memory.close()
    assert not memory.repeatable
