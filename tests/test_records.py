"""What the guard did is on record before the next step, everywhere a user may look."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_nanguard import Budget, Intervention, NaNGuard, Rollback, StopTraining, TrainingDivergedError
from lightning_nanguard.record.files import read_records
from tests.helpers import (
    Batch,
    FaultAt,
    States,
    batches,
    copied,
    differences,
    fit,
    task,
    trainer_for,
    with_bad,
    words,
)
from tests.modules import Diverge, NaNWeight

pytestmark = pytest.mark.usefixtures("own_folder")

FIELDS = {
    "schema",
    "global_step",
    "epoch",
    "batch_idx",
    "fault",
    "place",
    "remedies",
    "lr_before",
    "lr_after",
    "snapshot_step",
    "cause",
    "finding",
}


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


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of records, parsed as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- on disk


def test_on_disk_before_the_next_step(tmp_path: Path) -> None:
    """Each record is whole on disk when the next batch starts."""
    path = tmp_path / "nanguard" / "interventions.jsonl"
    seen: list[int] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            seen.append(len(lines(path)) if path.exists() else 0)

    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(task(), with_bad(4, 9), guard, folder=tmp_path, callbacks=[Look(), NaNWeight(15)])
    assert seen == [0] * 5 + [1] * 5 + [2] * 6 + [3] * 8


def test_schema(tmp_path: Path) -> None:
    """A line is one JSON object with every field of the record and a schema version, and reads back as the record."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(task(), with_bad(4), guard, folder=tmp_path, callbacks=[NaNWeight(15)])
    path = tmp_path / "nanguard" / "interventions.jsonl"
    skip, restore = lines(path)
    assert set(skip) >= FIELDS
    assert skip["schema"] == 1
    assert (skip["global_step"], skip["epoch"], skip["batch_idx"]) == (5, 0, 4)
    assert skip["fault"] == "non_finite_loss"
    assert skip["remedies"] == ["skip"]
    assert skip["cause"] == "non_finite_input"
    assert skip["lr_before"] == skip["lr_after"] == 0.01
    assert restore["remedies"] == ["restore"]
    assert restore["place"] == "parameter net.0.weight"
    assert restore["snapshot_step"] is not None
    assert restore["snapshot_step"] <= 15
    # The value that gave a fault away may be NaN, which equals nothing: compare what is written.
    assert [r.to_dict() for r in read_records(path)] == [i.to_dict() for i in guard.interventions]


def test_in_the_loggers_folder(tmp_path: Path) -> None:
    """Without a dirpath the records lie in the logger's own folder of this run."""
    logger = CSVLogger(tmp_path, "runs", "seven")
    fit(task(), with_bad(4), NaNGuard(), logger=logger)
    assert len(lines(tmp_path / "runs" / "seven" / "nanguard" / "interventions.jsonl")) == 1


@pytest.mark.parametrize("as_text", [True, False])
def test_dirpath(tmp_path: Path, as_text: bool) -> None:
    """A dirpath is where the records go, made with the first of them."""
    folder = tmp_path / "some" / "where"
    guard = NaNGuard(dirpath=str(folder) if as_text else folder)
    fit(task(), with_bad(4), guard, folder=tmp_path / "root")
    assert len(lines(folder / "interventions.jsonl")) == 1
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").rglob("*.jsonl"))


def test_healthy_run_leaves_no_folder(tmp_path: Path) -> None:
    """A run in which nothing happened writes no file of records."""
    fit(task(), batches(), NaNGuard(), folder=tmp_path)
    assert list(tmp_path.rglob("*nanguard*")) == []


def test_unwritable_folder_does_not_end_training(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be written is told once; the run goes on and the record is kept in memory."""
    # A file where a folder should be: nobody can write there, not even root.
    (tmp_path / "taken").write_text("")
    guard = NaNGuard(dirpath=tmp_path / "taken" / "nanguard")
    run = fit(task(), with_bad(4, 9), guard)
    assert run.trainer.global_step == 24
    assert words(guard) == [("skip",), ("skip",)]
    assert sum("cannot write its records" in record.getMessage() for record in log.records) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_does_not_end_training(tmp_path: Path) -> None:
    """A read-only folder is no reason to lose a run."""
    tmp_path.chmod(0o500)
    guard = NaNGuard(dirpath=tmp_path / "nanguard")
    assert fit(task(), with_bad(4), guard).trainer.global_step == 24


@pytest.mark.slow
def test_whole_on_disk_bounded_in_memory(tmp_path: Path) -> None:
    """More interventions than memory keeps are all on disk."""
    guard = NaNGuard(budget=Budget(window=10, max_skip_share=1.0), dirpath=tmp_path)
    fit(task(), with_bad(*range(1, 24, 2)), guard, max_epochs=84)
    assert len(lines(tmp_path / "interventions.jsonl")) == 1008
    assert len(guard.interventions) == 1000
    assert guard.interventions[-1].epoch == 83


def test_observed_only(tmp_path: Path) -> None:
    """What would have been done is on record as such."""
    guard = NaNGuard(observe=True, dirpath=tmp_path)
    fit(task(), with_bad(4, count=6), guard)
    (first, *_) = lines(tmp_path / "interventions.jsonl")
    assert first["applied"] is False
    assert first["remedies"] == ["skip"]


# ---------------------------------------------------------------------------------------------------- to loggers


def cut_and_clip(logger: Any, **options: Any) -> NaNGuard:
    """A run in which a batch is skipped and, later, the learner slowed and clipped."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    faults = [Diverge(7, 10)]
    fit(task(), with_bad(20), guard, logger=logger, callbacks=faults, **options)
    assert guard.lr_multiplier < 1.0
    return guard


def test_csv_logger(tmp_path: Path) -> None:
    """A CSVLogger gets the count, the multiplier, the usual gradient norm and the clipping value."""
    guard = cut_and_clip(CSVLogger(tmp_path, "csv", "0"))
    with open(tmp_path / "csv" / "0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("nanguard/interventions")]
    assert [float(row["nanguard/interventions"]) for row in rows] == [float(i + 1) for i in range(len(rows))]
    assert len(rows) == len(guard.interventions)
    assert float(rows[-1]["nanguard/lr_multiplier"]) == pytest.approx(guard.lr_multiplier)
    assert float(rows[-1]["nanguard/grad_norm"]) > 0
    assert float(rows[-1]["nanguard/clip_val"]) > 0


def test_tensorboard_logger(tmp_path: Path) -> None:
    """A TensorBoardLogger gets the same numbers at the same steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guard = cut_and_clip(TensorBoardLogger(str(tmp_path), "tb", "0"))
    events = EventAccumulator(str(tmp_path / "tb" / "0"))
    events.Reload()
    assert [event.value for event in events.Scalars("nanguard/interventions")] == [
        float(i + 1) for i in range(len(guard.interventions))
    ]
    assert events.Scalars("nanguard/lr_multiplier")[-1].value == pytest.approx(guard.lr_multiplier)
    assert events.Scalars("nanguard/grad_norm")[-1].value > 0


def test_every_logger(tmp_path: Path) -> None:
    """With several loggers each gets the record."""
    loggers = [CSVLogger(tmp_path, "one", "0"), CSVLogger(tmp_path, "two", "0")]
    fit(task(), with_bad(4), NaNGuard(), logger=loggers)
    for logger in loggers:
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            assert any(row.get("nanguard/interventions") for row in csv.DictReader(file))


def test_steps_of_the_logger() -> None:
    """The numbers stand at the step at which the rest of that batch is logged."""
    guard = NaNGuard()
    run = fit(task(), with_bad(4), guard)
    rows = [(step, row) for step, row in run.logger.rows if "nanguard/interventions" in row]
    losses = [step for step, row in run.logger.rows if "loss_step" in row]
    assert [step for step, _ in rows] == [losses[4]]


def test_no_logger(tmp_path: Path) -> None:
    """A Trainer without a logger has its records below its root folder."""
    guard = NaNGuard()
    fit(task(), with_bad(4), guard, folder=tmp_path, logger=False)
    assert words(guard) == [("skip",)]
    assert len(lines(tmp_path / "nanguard" / "interventions.jsonl")) == 1


# ---------------------------------------------------------------------------------------------------- to people


def test_on_intervention() -> None:
    """The user's function gets every record, at once."""
    got: list[Intervention] = []
    at: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            at.append(len(got))

    guard = NaNGuard(on_intervention=got.append)
    fit(task(), with_bad(4, 9), guard, callbacks=[Count()])
    assert got == list(guard.interventions)
    assert at == [0] * 5 + [1] * 5 + [2] * 14


def test_on_intervention_that_raises(log: pytest.LogCaptureFixture) -> None:
    """A fault in the user's function is told, and neither ends training nor loses a record."""

    def broken(intervention: Intervention) -> None:
        raise RuntimeError("no mail today")

    guard = NaNGuard(on_intervention=broken)
    run = fit(task(), with_bad(4), guard)
    assert run.trainer.global_step == 24
    assert words(guard) == [("skip",)]
    assert "no mail today" in log.text


def test_progress_bar_only_after_an_intervention() -> None:
    """The progress bar shows the count once there is one to show, and not before; without a bar nothing is logged."""
    shown: list[dict[str, Any]] = []

    class Look(ProgressBar):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            shown.append({k: v for k, v in trainer.progress_bar_metrics.items() if "nanguard" in k})

        def disable(self) -> None:
            pass

    assert "nanguard" not in fit(task(), with_bad(4), NaNGuard()).trainer.callback_metrics
    fit(task(), with_bad(4), NaNGuard(), callbacks=[Look()], enable_progress_bar=True)
    assert shown[:5] == [{}] * 5
    assert list(shown[5].values()) == [1.0]
    assert list(shown[-1].values()) == [1.0]


def test_console(log: pytest.LogCaptureFixture) -> None:
    """An intervention is one readable warning: where, what, why, and what was done."""
    fit(task(), with_bad(4), NaNGuard())
    (line,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING and "NaNGuard" in r.getMessage()]
    for part in ("step 5", "epoch 0", "batch 4", "non_finite_loss", "skipped the batch", "non_finite_input"):
        assert part in line


@pytest.mark.parametrize("bad", [(), (4,)], ids=["nothing", "one skip"])
def test_end_of_fit(bad: tuple[int, ...], log: pytest.LogCaptureFixture) -> None:
    """One line at the end of fit says what happened, also when nothing did."""
    fit(task(), with_bad(*bad), NaNGuard())
    told = [r.getMessage() for r in log.records if "updates watched" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("NaNGuard: 24 updates watched")
    if bad:
        for part in ("1 intervention (non_finite_loss 1)", "1 batch skipped", "interventions.jsonl"):
            assert part in told[0]
    else:
        assert told[0].endswith("nothing to do")


def test_end_of_a_second_fit(log: pytest.LogCaptureFixture) -> None:
    """The line at the end of a second fit with the same guard is about that fit."""
    guard = NaNGuard()
    fit(task(), with_bad(4), guard)
    fit(task(), batches(count=24), guard)
    told = [r.getMessage() for r in log.records if "updates watched" in r.getMessage()]
    assert told[1].endswith("nothing to do")


# ---------------------------------------------------------------------------------------------------- the end


def stopped(guard: NaNGuard, data: list[Batch], *callbacks: Callback) -> tuple[TrainingDivergedError, Any, Trainer]:
    module = task()
    trainer = trainer_for(None, guard, callbacks, max_epochs=2)
    trainer.limit_val_batches = 0
    with pytest.raises(TrainingDivergedError, match="Training cannot go on") as caught:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), torch.utils.data.DataLoader(data))
    return caught.value, module, trainer


def test_stop_says_what_why_and_what_to_do() -> None:
    """The error names fault, place, reason, what was tried, and what to do, in its text and as attributes."""
    guard = NaNGuard(remedies=[Rollback(), StopTraining()], snapshot_every_n_steps=2)
    error, _, _ = stopped(guard, with_bad(6), FaultAt("loss", math.nan, range(14, 200)))
    text = str(error)
    assert error.fault is not None
    assert error.fault.kind == "non_finite_loss"
    for part in ("Step ", "epoch 1", "non_finite_loss", "loss", error.reason, "skip", "lower the learning rate"):
        assert part in text, part
    assert error.tried
    assert guard.interventions[-1].remedies[-1] == "stop"


def test_stop_leaves_the_last_good_weights() -> None:
    """After a stop the module holds, bit by bit, the weights of the step that the error names."""
    states = States()
    guard = NaNGuard(remedies=[StopTraining()], snapshot_every_n_steps=2)
    error, module, _ = stopped(guard, batches(count=24), NaNWeight(15), states)
    assert error.snapshot_step is not None
    assert error.snapshot_step <= 15
    assert f"The module holds the weights of step {error.snapshot_step}" in str(error)
    wanted = states.after[error.snapshot_step]["parameters"]
    assert differences(wanted, copied(dict(module.named_parameters()))) == []
    assert guard.interventions[-1].snapshot_step == error.snapshot_step


def test_stop_is_on_disk(tmp_path: Path) -> None:
    """The record of the stop itself is on disk when the error is raised."""
    guard = NaNGuard(remedies=[StopTraining()], dirpath=tmp_path, snapshot_every_n_steps=2)
    stopped(guard, batches(count=24), NaNWeight(15))
    assert lines(tmp_path / "interventions.jsonl")[-1]["remedies"] == ["stop"]


def test_end_line_after_a_stop(log: pytest.LogCaptureFixture) -> None:
    """A run that was stopped has its line at the end as well."""
    guard = NaNGuard(remedies=[StopTraining()], snapshot_every_n_steps=2)
    stopped(guard, batches(count=24), NaNWeight(15))
    told = [r.getMessage() for r in log.records if "updates watched" in r.getMessage()]
    assert len(told) == 1
    assert "1 stop" in told[0]


def test_the_share_of_non_finite_updates_is_counted(tmp_path: Path) -> None:
    """After a fit the guard tells how many of its updates were not finite."""
    data = with_bad(12, count=20)
    guard = NaNGuard(dirpath=tmp_path)
    assert guard.non_finite_rate is None
    fit(task("mlp"), data, guard, folder=tmp_path)
    assert guard.non_finite_rate == pytest.approx(1 / 20)
