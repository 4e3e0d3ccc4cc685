"""Numbers among attributes that hooks around a bad step made NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard.state.attribute_memory import Attributes
from lightning_nanguard.state.attribute_numbers import AttributeNumbers
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds


def opened(numbers: AttributeNumbers, module: Any) -> None:
    """A step begins with the attributes as they are."""
    numbers.begin()
    numbers.open(Attributes([(module, ())]))


@pytest.mark.parametrize("kind", [float, torch.tensor, np.array])
def test_what_was_nan_before_the_step_gets_its_last_good_value(kind: Any) -> None:
    """The value is the one with which the newest step began that was not left out, however many are left out."""
    module, numbers = SimpleNamespace(mean=kind(0.5), seen=1), AttributeNumbers()
    for value in (1.0, 2.0):
        module.mean = kind(value)
        opened(numbers, module)
    for seen in range(2):
        module.mean, module.seen = kind(math.nan), seen
        opened(numbers, module)
        numbers.undo()
        assert (float(module.mean), module.seen) == (2.0, seen)


def test_what_was_nan_after_the_step_gets_it_before_the_next_one() -> None:
    """What the end of the batch has changed is put back where the next step begins."""
    module, numbers = SimpleNamespace(mean=1.0), AttributeNumbers()
    opened(numbers, module)
    opened(numbers, module)
    numbers.undo()
    module.mean = math.nan
    numbers.begin()
    assert module.mean == 1.0


def test_a_good_step_puts_nothing_back() -> None:
    """What is NaN without a step being left out is the user's."""
    module, numbers = SimpleNamespace(mean=1.0), AttributeNumbers()
    for value in (1.0, math.nan, math.nan):
        module.mean = value
        opened(numbers, module)
        assert module.mean is value


def test_what_is_left_alone() -> None:
    """Infinite and finite numbers, what never was a number, large tensors, and tensors of a graph."""
    limits = replace(RepeatedStepsThresholds(), copied_bytes=8)
    large, graph = torch.zeros(3), torch.zeros(1, requires_grad=True) * 2
    module = SimpleNamespace(best=1.0, mean=1.0, name="a", large=large, graph=graph)
    numbers = AttributeNumbers(limits)
    opened(numbers, module)
    opened(numbers, module)
    after = {"best": math.inf, "mean": 3.0, "name": math.nan, "large": large * math.nan, "graph": graph * math.nan}
    vars(module).update(after)
    numbers.undo()
    assert vars(module) == after
