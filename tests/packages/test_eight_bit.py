"""Optimizers of torchao and bitsandbytes, which keep their state in eight bits or less."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from tests.helpers import Batch, Run, Task, fit, learner_of, non_finite, with_nan, words

OPTIMIZERS = [
    ("torchao.optim", "AdamW8bit"),
    ("torchao.optim", "AdamW4bit"),
    ("torchao.optim", "AdamWFp8"),
    ("bitsandbytes.optim", "AdamW8bit"),
    ("bitsandbytes.optim", "Adam8bit"),
]


def data() -> list[Batch]:
    """48 batches, wide enough for states in blocks of 4,096 elements."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 64, generator=generator) for _ in range(48)]
    return [(x, x.tanh()) for x in inputs]


class Struck(Task):
    """Loses a weight before a batch.

    Args:
        home: Module of the optimizer.
        name: Its name.
        at: Before which batch; -1 for none.
    """

    def __init__(self, home: str, name: str, at: int = -1) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)))
        self.home, self.name, self.at = home, name, at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            with torch.no_grad():
                self.net[0].weight[0, 0] = torch.nan

    def configure_optimizers(self) -> Optimizer:  # type: ignore[override]
        made: Optimizer = getattr(import_module(self.home), self.name)(self.parameters(), lr=1e-3)
        return made


def losses_of(run: Run) -> Tensor:
    x, y = data()[0]
    with torch.no_grad():
        return (run.module.net(x) - y).square().mean()


@pytest.mark.parametrize(("home", "name"), OPTIMIZERS)
def test_states_of_eight_bits(home: str, name: str, tmp_path: Path) -> None:
    """A healthy run is the same bit for bit; a bad batch is skipped; a lost weight comes back, and all ends finite."""
    pytest.importorskip(home)
    guard = NaNGuard(snapshot_every_n_steps=4)
    bare = fit(Struck(home, name), data(), folder=tmp_path)
    healthy = fit(Struck(home, name), data(), guard, folder=tmp_path)
    pairs = zip(bare.module.parameters(), healthy.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert words(guard) == []
    guard = NaNGuard(snapshot_every_n_steps=4)
    bad = [with_nan(batch) if index == 20 else batch for index, batch in enumerate(data())]
    skipped = fit(Struck(home, name), bad, guard, folder=tmp_path)
    assert words(guard) == [("skip",)]
    guard = NaNGuard(snapshot_every_n_steps=4)
    lost = fit(Struck(home, name, 20), data(), guard, folder=tmp_path)
    assert words(guard)[0][0] == "restore"
    for run in (skipped, lost):
        assert non_finite(learner_of(run.trainer, run.module)["parameters"]) == []
        assert float(losses_of(run)) < 2 * float(losses_of(bare))
