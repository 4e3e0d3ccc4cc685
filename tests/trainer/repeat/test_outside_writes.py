"""Updates are not made again across a write of the user's code to a tensor that they do not change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.snapshot import Snapshot, capture
from lightning_nanguard.trainer.repeat.outside_writes import written_outside
from tests.helpers import Batch, FaultAt, Task, batches, fit, mlp, words


class Targets(Task):
    """Trains towards a copy of its own net, which a hook renews now and then, as in deep Q-learning."""

    def __init__(self, every: int) -> None:
        super().__init__(mlp())
        self.every = every
        self.target = mlp().requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - wanted).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step % self.every == 0:
            self.target.load_state_dict(self.net.state_dict())


@pytest.mark.parametrize(("every", "done"), [(100, ("restore", "redo")), (9, ("restore",))])
def test_a_weight_that_is_lost_after_a_target_was_renewed(every: int, done: tuple[str, ...], tmp_path: Path) -> None:
    """If the target was renewed since the snapshot, the record says that updates are undone; else none is lost."""
    guard = NaNGuard(snapshot_every_n_steps=8)
    fit(Targets(every), batches(count=30), guard, folder=tmp_path, callbacks=[FaultAt("weight", math.nan, [20])])
    assert words(guard) == [done]
    assert (guard.interventions[0].updates_lost > 0) == ("redo" not in done)


def test_what_counts_as_written() -> None:
    """A tensor that changed in the run alone, in more than one element, to finite numbers."""
    net = nn.Linear(3, 2)
    learner = Learner(net, [torch.optim.SGD(net.parameters(), lr=0.1)])

    def state(weight: list[float], bias: float = 0.0) -> Snapshot:
        with torch.no_grad():
            net.weight.copy_(torch.tensor(weight).view(2, 3))
            net.bias.fill_(bias)
        return capture(learner, step=1, global_step=1)

    start, trained = [0.0] * 6, [1.0] * 6
    assert written_outside(state(start), state(trained), state(trained)) is None
    assert written_outside(state(start), state(trained), state(start)) == "parameter weight"
    assert written_outside(state(start), state([9.0, *start[1:]]), state(start)) is None
    assert written_outside(state(start), state([math.nan, *trained[1:]]), state(start)) is None
    assert written_outside(state(start), state(start, bias=2.0), state(start)) == "parameter bias"
