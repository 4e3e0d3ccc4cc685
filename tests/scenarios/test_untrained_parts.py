"""Parameters that no optimizer trains are restored alone: a fault in them costs the trained weights nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nanguard import NaNGuard
from tests.helpers import Run, Task, batches, differences, fit, mlp, state_of, words
from tests.scenarios.struck import NAN, adam

STEPS = 160


class Averaging(Task):
    """Keeps an average of its net as a frozen submodule, a frozen mask, and a frozen net that never changes.

    Args:
        decay: The decay of the average.
        reads: Whether the loss compares the net with the average.
        bad: The batch after which the average holds NaN.
    """

    def __init__(self, decay: float, *, reads: bool = False, bad: int = -1) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), adam)
        self.decay, self.reads, self.bad = decay, reads, bad
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.reference = mlp().requires_grad_(False)
        for parameter in self.reference.parameters():
            parameter.data.mul_(50)
        self.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss + functional.mse_loss(self.net(batch[0]), self.ema(batch[0])) if self.reads else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.mul_(self.decay).add_(weight, alpha=1 - self.decay)
                if batch_idx == self.bad:
                    average.fill_(NAN)


def run(folder: Path, guard: NaNGuard | None, decay: float, **options: Any) -> Run:
    return fit(Averaging(decay, **options), batches(count=STEPS), guard, folder=folder)


def without_average(state: dict[str, Any]) -> dict[str, Any]:
    for part in ("parameters", "state_dict"):
        state[part] = {name: one for name, one in state[part].items() if not name.startswith("ema.")}
    return state


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
def test_an_average_that_explodes(act_on: Literal["certain", "evidence"], tmp_path: Path) -> None:
    """The net ends to the bit as without a guard, and the record names the average and the code that writes to it."""
    bare = run(tmp_path / "bare", None, 3.0)
    guard = NaNGuard(act_on=act_on, snapshot_every_n_steps=16)
    guarded = run(tmp_path / "guarded", guard, 3.0)
    assert differences(without_average(state_of(bare)), without_average(state_of(guarded))) == []
    assert set(words(guard)) == {("restore averages",)}
    assert {one.fault for one in guard.interventions} <= {"implausible_state", "corrupted_state"}
    for one in guard.interventions:
        assert one.updates_lost == 0
        assert one.finding is not None
        assert one.finding.place.startswith("parameter ema.")
        assert "no optimizer trains it" in one.finding.suggestion
        assert "an average needs a decay below 1" in one.finding.suggestion
    assert [(one.finding.cause, one.finding.place) for one in guard.advice] == [("average_too_large", "ema")]
    assert all(bool(torch.isfinite(one).all()) for name, one in guarded.module.named_parameters() if "ema" in name)


@pytest.mark.parametrize("decay", [0.9, 1.02])
def test_an_average_that_grows_is_told(decay: float, tmp_path: Path) -> None:
    """It is told once, where it grows beyond all that it can be an average of; a frozen net and a mask are sound."""
    bare = run(tmp_path / "bare", None, decay)
    for act_on in ("certain", "evidence"):
        guard = NaNGuard(act_on=act_on, snapshot_every_n_steps=16)
        guarded = run(tmp_path / act_on, guard, decay)
        assert differences(state_of(bare), state_of(guarded)) == []
        assert guard.interventions == ()
        told = [("average_too_large", "ema")] if decay > 1 else []
        assert [(one.finding.cause, one.finding.place) for one in guard.advice] == told


def test_a_teacher_that_the_loss_reads(tmp_path: Path) -> None:
    """Its loss is not finite, which is certain. The record names the teacher, and no rate is lowered for it."""
    guard = NaNGuard(snapshot_every_n_steps=16)
    guarded = run(tmp_path, guard, 0.9, reads=True, bad=100)
    assert [
        one.finding is not None and one.finding.place.startswith("parameter ema.") for one in guard.interventions
    ] == [True]
    assert guard.lr_multiplier == 1.0
    assert guard.interventions[0].updates_lost <= 1
    assert all(bool(torch.isfinite(one).all()) for one in guarded.module.parameters() if one.dim() > 1)
