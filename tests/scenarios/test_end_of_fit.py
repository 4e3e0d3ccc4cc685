"""The end of a fit: one line says what happened, and a run that cannot be helped says why and keeps good weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from lightning_nanguard import Budget, NaNGuard, Rollback, StopTraining, TrainingDivergedError
from tests.helpers import ONCE, Batch, FaultAt, States, batches, copied, differences, fit, task, trainer_for, with_bad
from tests.modules import NaNWeight

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every line at INFO and above, also of loggers that Lightning keeps from the root."""
    kept = {name: logging.getLogger(name).propagate for name in ("lightning.pytorch", "pytorch_lightning")}
    for name in kept:
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.INFO):
        yield caplog
    for name, propagate in kept.items():
        logging.getLogger(name).propagate = propagate


def told(log: pytest.LogCaptureFixture) -> list[str]:
    """The lines that say how long was watched."""
    return [line for record in log.records if "updates watched" in (line := record.getMessage())]


def test_one_line_says_what_happened_in_this_fit(log: pytest.LogCaptureFixture) -> None:
    """It names faults, remedies, the file of records and for what the guard acts; a second fit with the same guard
    has a line of its own."""
    data = with_bad(12, count=20)
    guard = NaNGuard()
    assert guard.non_finite_rate is None
    fit(task(), data, guard)
    assert guard.non_finite_rate == pytest.approx(1 / 20)
    folder = guard.run_dir
    fit(task(), batches(count=24), guard)
    fit(task(), batches(count=4), NaNGuard(act_on="evidence"))
    first, second, third = told(log)
    expected = 'NaNGuard: 20 updates watched (act_on="certain"), 1 intervention (non-finite loss 1): 1 batch skipped'
    assert first.startswith(expected)
    assert first.endswith(f"nanguard explain {folder}")
    assert second == 'NaNGuard: 24 updates watched (act_on="certain"), no interventions'
    assert third == 'NaNGuard: 4 updates watched (act_on="evidence"), no interventions'
    assert guard.non_finite_rate == 0.0


def stopped(guard: NaNGuard, data: list[Batch], *callbacks: Callback) -> tuple[TrainingDivergedError, Any, Trainer]:
    module = task()
    trainer = trainer_for(None, guard, callbacks, max_epochs=2)
    trainer.limit_val_batches = 0
    with pytest.raises(TrainingDivergedError, match="Training cannot go on") as caught:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), torch.utils.data.DataLoader(data))
    return caught.value, module, trainer


def test_stop_says_what_why_and_what_to_do() -> None:
    """The error names fault, place, reason, what was tried, and what to do, in its text and as attributes."""
    guard = NaNGuard(remedies=[Rollback(), StopTraining()], snapshot_every_n_steps=2, budget=Budget(max_bad_batches=32))
    error, _, _ = stopped(guard, with_bad(6), FaultAt("loss", math.nan, range(14, 200)))
    text = str(error)
    assert error.fault is not None
    assert error.fault.kind == "non_finite_loss"
    for part in ("step ", "epoch 1", "non_finite_loss", "loss", error.reason, "skip"):
        assert part in text, part
    assert text.splitlines()[-2:] == [
        "  limit: if the run should have gone on, raise Budget(max_bad_batches=…)",
        f"  next: nanguard explain {guard.run_dir}",
    ]
    assert error.tried
    assert guard.interventions[-1].remedies[-1] == "stop"


def test_stop_leaves_the_last_good_weights(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """After a stop the module holds, bit by bit, the weights of the step that the error names; the record of the stop
    is on disk when the error is raised, and the run has its line at the end as well.
    """
    states = States()
    guard = NaNGuard(thresholds=ONCE, remedies=[StopTraining()], dirpath=tmp_path, snapshot_every_n_steps=2)
    error, module, _ = stopped(guard, batches(count=24), NaNWeight(15), states)
    assert error.snapshot_step is not None
    assert error.snapshot_step <= 15
    assert f"the module holds the weights of step {error.snapshot_step}\n" in str(error)
    wanted = states.after[error.snapshot_step]["parameters"]
    assert differences(wanted, copied(dict(module.named_parameters()))) == []
    assert guard.interventions[-1].snapshot_step == error.snapshot_step
    *_, record = (tmp_path / "interventions.jsonl").read_text().splitlines()
    assert json.loads(record)["remedies"] == ["stop"]
    (line,) = told(log)
    assert "1 stop" in line
