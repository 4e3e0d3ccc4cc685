"""Faults that no operation explains are told with what is known of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from lightning_nanguard import Case, Clues, Evidence, Fault, NaNGuard, Origin
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import GRADIENT, LOSS, OVERFLOW, SPIKE, Row, rules_of, surest_cause
from tests.helpers import data_for, fit, task

HUGE = {"batch_finite": True, "usual_norm": 1.9}
GOOD = Clues(replayed=True, loss=1.0, gradient_finite=True, norm=2.0)

ROWS: list[Row] = [
    ("changed_gradient", GRADIENT, {}, GOOD),
    ("changed_gradient", OVERFLOW, HUGE, GOOD),
    # A hook of a tensor is part of the backward pass, and no operation of it.
    ("changed_gradient", GRADIENT, {}, Clues(replayed=True, gradient_finite=False)),
    ("unknown_operation", GRADIENT, {}, Clues(replayed=True, gradient_finite=False, origin=Origin("mystery"))),
    # The replay was made from good weights, or made the same gradient.
    ("corrupted_state", GRADIENT, {"corrupt": "parameter w"}, GOOD),
    ("exploding_gradient", OVERFLOW, HUGE, Clues(replayed=True, loss=1.0, gradient_finite=True, norm=1e20)),
    (None, SPIKE, {"usual_norm": 1.9}, GOOD),
    ("unexplained", GRADIENT, {"undo": True}, GOOD),
    ("unexplained", GRADIENT, {"batch_finite": True, "comparable": False}, Clues()),
    ("unexplained", LOSS, {"batch_finite": True, "comparable": False}, Clues()),
    ("non_finite_input", LOSS, {"batch_finite": False, "comparable": False}, Clues()),
    # A loss that was finite again.
    (None, LOSS, {}, Clues(replayed=True, loss=1.0, gradient_finite=True)),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), ROWS)
def test_the_surest_cause(cause: str | None, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """Only if no other rule fits, and nothing speaks against it."""
    assert surest_cause(fault, known, clues) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("unexplained") <= {row[0] for row in ROWS}


@pytest.mark.parametrize(
    ("known", "clues", "said"),
    [
        ({"batch_finite": True}, Clues(), "no NaN or Inf was found in the batch or in weights and buffers, and the"),
        ({"batch_finite": None}, Clues(), "no NaN or Inf was found in weights and buffers, and the batch was not run"),
        ({"undo": True}, Clues(), "the batch was not run again, so the operation is not known. Look"),
        ({"undo": True}, GOOD, "the loss of this batch is finite under the last good weights. Look"),
    ],
)
def test_only_what_was_looked_at_is_said_to_be_good(known: dict[str, Any], clues: Clues, said: str) -> None:
    """The batch if it was at hand, and the weights unless the bad update had been made."""
    finding = RuleSet().diagnose(Case(LOSS, Evidence(step=50, **known), clues))
    assert finding is not None
    assert finding.suggestion.startswith(said)


class Writes(Callback):
    """Makes the module's own ``on_after_backward`` write a number into a gradient of one batch."""

    def __init__(self, value: float) -> None:
        self.value, self.batch = value, -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx
        pl_module.on_after_backward = lambda: self.write(pl_module)

    def write(self, module: Any) -> None:
        if self.batch == 12:
            next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = self.value


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_gradient_that_a_hook_wrote(value: float, tmp_path: Path) -> None:
    """Under automatic optimization the backward pass is known to be good, and so the hook is named. Under manual
    optimization the record says what is known, and names the hook among the places to look at."""
    guard = NaNGuard()
    fit(task("norm"), data_for("norm", 20), guard, folder=tmp_path / "a", callbacks=[Writes(value)])
    [found] = guard.interventions
    assert found.finding is not None
    assert (found.remedies, found.cause) == (("skip",), "changed_gradient")
    assert "Look at on_after_backward of the module" in found.finding.suggestion
    guard = NaNGuard()
    fit(task("manual"), data_for("manual", 20), guard, folder=tmp_path / "m", callbacks=[Writes(value)])
    assert guard.interventions
    for found in guard.interventions:
        assert found.finding is not None
        assert found.cause == ("unexplained" if math.isnan(value) else "exploding_gradient")
        assert "hooks" in found.finding.suggestion


def test_a_loss_that_is_bad_by_hand(tmp_path: Path) -> None:
    """Under manual optimization no batch is run again. The record says what holds no NaN, and what to look at."""
    data = data_for("manual", 20)

    class LogOfZero(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.loss_factor = torch.log(torch.zeros(())) if batch_idx == 12 else None

    guard = NaNGuard()
    fit(task("manual"), data, guard, folder=tmp_path, callbacks=[LogOfZero()])
    found = guard.interventions[0]
    assert found.finding is not None
    assert (found.fault, found.cause) == ("non_finite_loss", "unexplained")
    assert "no NaN or Inf was found in the batch or in weights and buffers" in found.finding.suggestion
