"""Faults in the very first update: what was good when the fit began is what the run goes back to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from lightning_nanguard import NaNGuard, TrainingDivergedError
from tests.helpers import Run, Task, batches, differences, fit, learner_of, mlp, state_of, with_nan, words


class Starts(Callback):
    """Changes the state before the first update, in a legitimate way or not.

    Args:
        spoils: What becomes NaN in the first ``on_train_batch_start``: ``"rate"``, ``"weight"`` or nothing.
        loads: The hook that sets the weights to others.
        forever: Whether the rate is NaN in all batches.
    """

    def __init__(self, spoils: str = "", loads: str = "", *, forever: bool = False) -> None:
        self.spoils, self.loads, self.forever = spoils, loads, forever

    def load(self, module: Any, hook: str) -> None:
        if self.loads == hook:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(0.1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.load(pl_module, "on_train_start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.load(pl_module, "on_train_batch_start")
        if self.spoils == "rate" and (batch_idx == 0 or self.forever):
            trainer.optimizers[0].param_groups[0]["lr"] = math.nan
        elif self.spoils == "rate":
            trainer.optimizers[0].param_groups[0]["lr"] = 0.01
        if self.spoils == "weight" and batch_idx == 0:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = math.nan


class ByHand(Task):
    """The same under manual optimization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, "loss"))
        optimizer.step()


def run(
    folder: Path, guard: NaNGuard | None, starts: Starts, data: Any = None, kind: Any = Task, **options: Any
) -> Run:
    torch.manual_seed(0)
    given = batches() if data is None else data
    return fit(kind(mlp(norm=True)), given, guard, folder=folder, callbacks=[starts], **options)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "window"])
@pytest.mark.parametrize("loads", ["", "on_train_start"])
def test_a_weight_that_is_lost_before_the_first_update(loads: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The run is bit for bit the one without the fault, from the weights that hooks have loaded."""
    guard = NaNGuard()
    left = run(tmp_path / "own", guard, Starts("weight", loads), **options)
    bare = run(tmp_path / "bare", None, Starts("", loads), **options)
    assert differences(state_of(left), state_of(bare)) == []
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].cause == "corrupted_state"


@pytest.mark.parametrize("way", ["by hand", "deferred"])
def test_where_no_step_is_made_again(way: str, tmp_path: Path) -> None:
    """The run goes back to the state of the start, and only the first updates are lost."""
    options: dict[str, Any] = {"kind": ByHand} if way == "by hand" else {}
    guard = NaNGuard(readback="step" if way == "by hand" else "deferred")
    left = run(tmp_path, guard, Starts("weight"), **options)
    assert words(guard)[0][0] == "restore"
    assert len(guard.interventions) == 1
    assert all(bool(torch.isfinite(one).all()) for one in left.module.parameters())
    assert left.trainer.global_step == 12


def test_weights_that_are_loaded_and_lost_in_one_hook(tmp_path: Path) -> None:
    """The state of the start is not the one that was loaded, so the run is not continued from it."""
    with pytest.raises(TrainingDivergedError, match="no good state yet to go back to"):
        run(tmp_path, NaNGuard(), Starts("weight", "on_train_batch_start"))


def test_a_bad_first_batch_certifies_nothing(tmp_path: Path) -> None:
    """It is skipped as before; the state of the start is certified by the first healthy loss."""
    guard = NaNGuard()
    data = [with_nan(batch) if index < 2 else batch for index, batch in enumerate(batches())]
    run(tmp_path, guard, Starts(), data=data)
    assert words(guard) == [("skip",)] * 2
    assert {one.cause for one in guard.interventions} == {"non_finite_input"}


@pytest.mark.parametrize("forever", [False, True])
def test_a_rate_that_is_lost_before_the_first_update(forever: bool, tmp_path: Path) -> None:
    """The updates are made at the rate with which the fit began, and nobody says that the rate was zero."""
    guard = NaNGuard()
    left = run(tmp_path / "own", guard, Starts("rate", forever=forever))
    bare = run(tmp_path / "bare", None, Starts())
    ends = [learner_of(one.trainer, one.module) for one in (left, bare)]
    differing = [one for one in differences(*ends) if "lr" not in one]
    assert differing == []
    assert words(guard) == [("hold rate",)]
    assert guard.advice == ()
