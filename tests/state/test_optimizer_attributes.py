"""Moments and counters that an optimizer keeps in attributes of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.finite import FiniteCheck
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import capture
from tests.helpers import batches, differences, fit, state_of, task, words


class Own(Optimizer):
    """SGD with momentum in a dictionary, a counter, a mean, a list of tensors, and a best loss that begins at Inf."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.momentum: dict[Tensor, Tensor] = {}
        self.best, self.steps, self.parameters = torch.tensor(math.inf), 0, self.param_groups[0]["params"]
        self._mean, self.last = torch.zeros(()), [torch.zeros(1)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        self.steps += 1
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is None:
                    continue
                moment = self.momentum.setdefault(parameter, torch.zeros_like(parameter))
                moment.mul_(0.9).add_(parameter.grad)
                parameter.sub_(moment, alpha=0.05)
                self._mean.add_(parameter.grad.mean())
                self.last = [parameter.grad.clone()]
        return loss


def test_they_are_restored_in_place() -> None:
    """As they were at the snapshot; moments that began later are gone, other names of the weights are no copies."""
    module = nn.Linear(2, 1)
    optimizer = Own(module.parameters())
    learner = Learner(module, [optimizer])
    begin = capture(learner, step=0, global_step=0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    later = capture(learner, step=1, global_step=1)
    own = {key[2:] for key in later.leaves if key[0] == "own"}
    names = {("momentum", "weight"), ("momentum", "bias"), ("best",), ("steps",), ("_mean",), ("last",)}
    assert own == names
    moment = optimizer.momentum[module.weight]
    optimizer.step()
    restore(learner, later)
    assert optimizer.momentum[module.weight] is moment
    assert moment.tolist() == [[1.0, 1.0]]
    assert (optimizer.steps, optimizer.last[0].tolist(), float(optimizer._mean)) == (1, [1.0], 2.0)
    assert FiniteCheck().corrupt(learner.leaves()) is None
    restore(learner, begin)
    assert (optimizer.momentum, optimizer.steps) == ({}, 0)
    restore(learner, later)
    assert optimizer.momentum[module.weight].tolist() == [[1.0, 1.0]], "a trial goes to the start and comes back"


def test_a_weight_that_goes_bad_by_itself_costs_nothing(tmp_path: Path) -> None:
    """The updates since the snapshot can be made again bit for bit, for the moments went back with the weights."""
    runs = []
    for guard, at in ((None, -1), (NaNGuard(), 20)):
        module = task(optimizer=Own)

        def start(batch: Any, batch_idx: int, module: Any = module, at: int = at) -> None:
            if batch_idx == at:
                next(module.parameters()).data.fill_(math.nan)

        module.on_train_batch_start = start
        runs.append(fit(module, batches(count=24), guard, folder=tmp_path))
        if guard is not None:
            assert words(guard) == [("restore", "redo")]
    assert differences(state_of(runs[1]), state_of(runs[0])) == []
    assert runs[0].trainer.optimizers[0].steps == runs[1].trainer.optimizers[0].steps
