"""Plain attributes of a module, put back as they were before a step, and numbers that hooks around it made NaN."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_nanguard.state.attribute_memory import AttributeMemory, AttributeNumbers, Attributes
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds


class Carries(nn.Module):
    """A module that carries a hidden state, counts and collects."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.hidden: torch.Tensor | None = None
        self.seen = 0
        self.outputs: list[int] = []
        self.table = {"a": 1}
        self.last = deque([1, 2], maxlen=2)

    def step(self, value: int) -> None:
        self.hidden = torch.full((1,), float(value))
        self.seen += 1
        self.outputs.append(value)
        self.table["b"] = value
        self.last.append(value)
        self.new = value


def test_everything_is_put_back() -> None:
    """Numbers, tensors and containers are what they were before the step; what it has added is gone."""
    module = Carries()
    memory = AttributeMemory(module)
    module.outputs.append(7)
    hidden = module.hidden = torch.ones(1)
    before = memory.open(checked=True)
    weight = module.inner.weight
    module.step(3)
    memory.close()
    before.restore()
    assert module.hidden is hidden
    assert (module.seen, module.outputs, module.table, list(module.last)) == (0, [7], {"a": 1}, [1, 2])
    assert not hasattr(module, "new")
    assert module.inner.weight is weight


def test_counters_may_stay() -> None:
    """Where a step is left out its tensors and containers go back, numbers and flags do not."""
    module = Carries()
    before = AttributeMemory(module).open(checked=True)
    module.step(3)
    before.restore(plain=False)
    assert (module.hidden, module.seen, module.new, module.outputs) == (None, 1, 3, [])


def test_a_long_list_that_only_grows_is_cut() -> None:
    """Its items are not copied before every step; those that the step has added go."""
    module = Carries()
    memory = AttributeMemory(module, replace(RepeatedStepsThresholds(), copied_items=3))
    module.outputs = [*range(10)]
    before = memory.open(checked=True)
    module.step(3)
    before.restore()
    assert module.outputs == [*range(10)]


def test_parts_whose_attributes_change_are_found() -> None:
    """A module inside is remembered from the checked step on in which it was seen to change, others are not."""
    root = nn.Sequential(Carries(), nn.Linear(2, 2))
    part: Carries = root[0]  # type: ignore[assignment]
    memory = AttributeMemory(root)
    before = memory.open(checked=False)
    part.step(1)
    memory.close()
    before.restore()
    assert part.seen == 1, "not yet known"
    memory.open(checked=True)
    part.step(2)
    memory.close()
    assert len(memory._changing) == 2
    before = memory.open(checked=False)
    part.step(3)
    memory.close()
    before.restore()
    assert (part.seen, part.outputs, part.new) == (2, [1, 2], 2)


def test_plain_values_that_changed_are_named() -> None:
    """Numbers and flags with another value than before; equal ones, tensors and containers are none."""
    module = Carries()
    before = AttributeMemory(module).open(checked=True)
    module.table = dict(module.table)
    assert before.plain_now() == []
    module.step(5)
    assert {(name, value) for _, name, value in before.plain_now()} == {("seen", 1), ("new", 5)}


def test_plain_values_alone_are_put_back() -> None:
    """What else a step has left in attributes stays as it is."""
    module = Carries()
    before = AttributeMemory(module).open(checked=True)
    module.step(5)
    outputs = module.outputs
    before.restore_plain()
    assert (module.seen, module.outputs) == (0, outputs)
    assert outputs == [5]


def test_objects_that_a_step_writes_to_are_found() -> None:
    """From the checked step on in which they were seen to change; arrays in them and in containers, too."""
    module = Carries()
    module.meter = SimpleNamespace(count=0, rows=np.zeros(2))
    module.nested = {"rows": [np.zeros(2)]}
    memory = AttributeMemory(module)

    def step() -> None:
        module.meter.count += 1
        module.meter.rows += 1
        module.nested["rows"][0] += 1

    memory.open(checked=True)
    step()
    memory.close()
    before = memory.open(checked=False)
    step()
    memory.close()
    before.restore()
    assert (module.meter.count, module.meter.rows.tolist(), module.nested["rows"][0].tolist()) == (1, [1, 1], [1, 1])


def test_a_number_that_is_not_finite_is_no_counter() -> None:
    """Where a step is left out its counters stay, and a running mean that it has made NaN goes back."""
    module = Carries()
    module.mean = 1.0
    before = AttributeMemory(module).open(checked=True)
    module.step(3)
    module.mean = float("nan")
    assert {name for _, name, _ in before.plain_now()} == {"seen", "new"}
    before.restore(plain=False)
    assert (module.mean, module.seen) == (1.0, 1)


def test_what_a_check_reaches_is_not_new() -> None:
    """A step that is looked at as a whole holds what a plain one left out; only what the step between made is new."""
    module = Carries()
    module.rows = [{"a": one} for one in range(100)]
    memory = AttributeMemory(module)
    plain, checked = memory.now(), memory.open(checked=True)
    assert checked.not_in(plain) == []
    module.hidden = torch.ones(1)
    assert memory.now().not_in(checked) == [module.hidden]


def test_long_containers_that_grew_are_shortened() -> None:
    """Of a long one only the length is known; a deque and a dictionary lose what was added last."""
    module = Carries()
    module.outputs, module.table, module.last = list(range(300)), dict.fromkeys("ab"), deque(range(300))
    module.table |= {str(one): one for one in range(300)}
    memory, names = AttributeMemory(module), ("outputs", "table", "last")
    before = memory.open(checked=True)
    lengths = [len(getattr(module, name)) for name in names]
    module.outputs.append(1)
    module.table["new"] = 1
    module.last.append(1)
    before.restore()
    assert [len(getattr(module, name)) for name in names] == lengths
    assert "new" not in module.table
    assert module.last[-1] == 299


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
