"""What the guard did is on record before the next step, everywhere a user may look."""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger

from lightning_nanguard import Advice, Finding, Intervention, NaNGuard, RunInfo, Sink
from lightning_nanguard.record.files import read_file, read_records
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.record.run_log import read_run
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.trainer.sinks import fit_advice
from tests.helpers import MemoryLogger, batches, fit, task, with_bad, words
from tests.modules import NaNWeight

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


class Keeps(Sink):
    """A user's sink that notes what it is asked, and how far the file of records was then."""

    ended: ClassVar[list[tuple[int, int, int]]] = []
    """How often each was opened, told and closed, when it was closed."""

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self.opened: list[RunInfo] = []
        self.got: list[Intervention] = []
        self.on_disk: list[int] = []
        self.closed = 0

    def open(self, run: RunInfo) -> None:
        self.opened.append(run)

    def write(self, intervention: Intervention) -> None:
        self.got.append(intervention)
        self.on_disk.append(len(lines(self.opened[-1].dirpath / "interventions.jsonl")))

    def close(self) -> None:
        self.closed += 1
        self.ended.append((len(self.opened), len(self.got), self.closed))


def note(intervention: Intervention) -> None:
    """A user's function that can be pickled."""


def broken(intervention: Intervention) -> None:
    """A user's function that fails."""
    raise RuntimeError("no mail today")


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of records, parsed as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@dataclass
class Looked:
    """A run with two bad batches and a bad weight, and what was there whenever a batch began."""

    guard: NaNGuard
    folder: Path
    loggers: list[Any]
    log: list[logging.LogRecord]
    sink: Keeps
    slow: Keeps
    got: list[Intervention] = field(default_factory=list)
    on_disk: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)


class Look(ProgressBar):
    """Looks whenever a batch begins."""

    def __init__(self, looked: Looked) -> None:
        super().__init__()
        self.looked = looked

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        looked = self.looked
        path = looked.folder / "interventions.jsonl"
        looked.on_disk.append(len(lines(path)) if path.exists() else 0)
        looked.told.append(len(looked.got))
        looked.shown.append({name: x for name, x in trainer.progress_bar_metrics.items() if "nanguard" in name})

    def disable(self) -> None:
        pass


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Looked]:
    """One run that most tests of this file look at."""
    root = tmp_path_factory.mktemp("looked")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("lightning_nanguard")
    logger.addHandler(handler)
    sink, slow, got = Keeps(), Keeps(timeout=60.0), list[Intervention]()
    guard = NaNGuard(snapshot_every_n_steps=2, on_intervention=got.append, sinks=[broken, sink, slow])
    loggers = [CSVLogger(root, "runs", "seven"), CSVLogger(root, "two", "0"), MemoryLogger()]
    found = Looked(guard, root / "runs" / "seven" / "nanguard", loggers, records, sink, slow, got)
    options: dict[str, Any] = {"logger": loggers, "enable_progress_bar": True}
    fit(task(), with_bad(4, 9), guard, folder=root, callbacks=[Look(found), NaNWeight(15)], **options)
    yield found
    logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------------- on disk


def test_on_disk_before_the_next_step(looked: Looked) -> None:
    """Each record is whole on disk when the next batch starts, in the first logger's own folder of this run."""
    assert looked.on_disk == [0] * 5 + [1] * 5 + [2] * 6 + [3] * 8


def test_schema(looked: Looked) -> None:
    """A line is one JSON object with every field of the record and a schema version, and reads back as the record."""
    path = looked.folder / "interventions.jsonl"
    skip, _, restore = lines(path)
    assert set(skip) >= FIELDS
    assert skip["schema"] == 1
    assert (skip["global_step"], skip["epoch"], skip["batch_idx"]) == (5, 0, 4)
    assert skip["fault"] == "non_finite_loss"
    assert skip["remedies"] == ["skip"]
    assert skip["cause"] == "non_finite_input"
    assert skip["lr_before"] == skip["lr_after"] == 0.01
    assert restore["remedies"] == ["restore", "redo"]
    assert restore["place"] == "parameter net.0.weight"
    assert restore["snapshot_step"] is not None
    assert restore["snapshot_step"] <= 15
    # The value that gave a fault away may be NaN, which equals nothing: compare what is written.
    assert [r.to_dict() for r in read_records(path)] == [i.to_dict() for i in looked.guard.interventions]


def test_dirpath(tmp_path: Path) -> None:
    """A dirpath is where the records go, made with the first of them; a text is taken for a path."""
    folder = tmp_path / "some" / "where"
    guard = NaNGuard(dirpath=str(folder))
    fit(task(), with_bad(4), guard, folder=tmp_path / "root")
    assert len(lines(folder / "interventions.jsonl")) == 1
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").rglob("*.jsonl"))


def test_no_logger_and_a_healthy_run(tmp_path: Path) -> None:
    """A run without a logger has its records in a folder of its own below the root folder; one without a fault writes
    none. Without a progress bar no metric is logged.
    """
    guard = NaNGuard()
    run = fit(task(), with_bad(4), guard, folder=tmp_path / "one", logger=False)
    assert words(guard) == [("skip",)]
    assert guard.run_dir == tmp_path / "one" / "nanguard" / str(guard.run_id)
    assert [record["run"] for record in lines(guard.run_dir / "interventions.jsonl")] == [guard.run_id]
    assert "nanguard" not in run.trainer.callback_metrics
    healthy = NaNGuard()
    fit(task(), batches(), healthy, folder=tmp_path / "two", logger=False)
    assert healthy.run_dir is not None
    assert not list(healthy.run_dir.glob("interventions*"))
    log = read_run(healthy.run_dir)
    assert log is not None
    assert log.ended is not None
    assert (log.run_id, log.ended["updates"], log.ended["faults"]) == (healthy.run_id, 12, {})


def test_unwritable_folder_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be written is told once; the run goes on and the record is kept in memory."""
    # A file where a folder should be: nobody can write there, not even root.
    (tmp_path / "taken").write_text("")
    guard = NaNGuard(dirpath=tmp_path / "taken" / "nanguard")
    run = fit(task(), with_bad(4, 9), guard)
    assert run.trainer.global_step == 24
    assert words(guard) == [("skip",), ("skip",)]
    assert sum("cannot write its records" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_does_not_end_training(tmp_path: Path) -> None:
    """A read-only folder is no reason to lose a run."""
    tmp_path.chmod(0o500)
    guard = NaNGuard(dirpath=tmp_path / "nanguard")
    assert fit(task(), with_bad(4), guard).trainer.global_step == 24


def test_whole_on_disk_bounded_in_memory(tmp_path: Path) -> None:
    """More interventions than memory keeps are all on disk."""
    guard = NaNGuard(dirpath=tmp_path, thresholds=Thresholds(records=RecordsThresholds(interventions_in_memory=10)))
    fit(task(), with_bad(*range(1, 24, 2)), guard)
    assert len(lines(tmp_path / "interventions.jsonl")) == 12
    assert [one.batch_idx for one in guard.interventions] == [*range(5, 24, 2)]


def test_observed_only(tmp_path: Path) -> None:
    """What would have been done is on record as such."""
    guard = NaNGuard(observe=True, dirpath=tmp_path)
    fit(task(), with_bad(4, count=6), guard)
    (first, *_) = lines(tmp_path / "interventions.jsonl")
    assert first["applied"] is False
    assert first["remedies"] == ["skip"]


# ---------------------------------------------------------------------------------------------------- to loggers


def test_every_logger(looked: Looked) -> None:
    """With several loggers each gets the numbers, at the step at which the rest of that batch is logged."""
    for logger in looked.loggers[:2]:
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            assert any(row.get("nanguard/interventions") for row in csv.DictReader(file))
    rows = looked.loggers[2].rows
    steps = [step for step, row in rows if "nanguard/interventions" in row]
    losses = [step for step, row in rows if "loss_step" in row]
    assert steps[:2] == [losses[4], losses[9]]


def test_progress_bar_only_after_an_intervention(looked: Looked) -> None:
    """The progress bar shows the count once there is one to show, and not before."""
    assert looked.shown[:5] == [{}] * 5
    assert list(looked.shown[5].values()) == [1.0]
    assert list(looked.shown[-1].values()) == [3.0]


# ---------------------------------------------------------------------------------------------------- to people


def test_on_intervention(looked: Looked) -> None:
    """The user's function gets every record, at once."""
    assert looked.got == list(looked.guard.interventions)
    assert looked.told == looked.on_disk


def test_a_sink_of_the_users(looked: Looked) -> None:
    """It is opened once with the run, given each record when that is on disk, and closed once; a slow one, too."""
    for sink in (looked.sink, looked.slow):
        assert sink.opened == [RunInfo(0, 1, looked.folder, looked.guard.run_id or "")]
        assert sink.got == looked.got
        assert sink.closed == 1
    assert looked.sink.on_disk == [1, 2, 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanguard")]


def test_a_function_that_raises(looked: Looked) -> None:
    """A fault in the user's function is told once, and neither ends training nor loses a record."""
    assert len(looked.on_disk) == 24
    told = [record.getMessage() for record in looked.log if "broken" in record.getMessage()]
    assert f"{__name__}.broken could not take a record: RuntimeError: no mail today" in told[0]
    assert f"{__name__}.broken missed 3 records" in told[1]
    assert len(told) == 2


def test_console(looked: Looked) -> None:
    """An intervention is one readable warning: where, what, why, what was done, and what to do; one that is back is a
    line, and the console says no more than that."""
    told = [line for record in looked.log if (line := record.getMessage()).startswith("NaNGuard: step")]
    first, second, rollback, *_ = told  # the logger is heard in later tests, too
    for part in ("step 5", "epoch 0", "batch 4", "non-finite loss", "why: non-finite input", "done: skipped", "to do:"):
        assert part in first
    again = (
        r"non-finite loss again \(sample 0, batch 9 of the epoch, hash [0-9a-f]{16}\); skipped the batch \(2 so far\)"
    )
    assert re.fullmatch(rf"NaNGuard: step 10 \(epoch 0, batch 9\): {again}", second)
    assert "done: went back to step" in rollback


# ---------------------------------------------------------------------------------------------------- from fit to fit


def test_copies_and_pickles(tmp_path: Path) -> None:
    """A guard with sinks is copied and pickled before and after a fit, and trains afterwards; each fit opens and closes
    its sinks.
    """
    Keeps.ended.clear()
    guard = NaNGuard(dirpath=tmp_path, on_intervention=note, sinks=[note, Keeps(), Keeps(timeout=60.0)])
    for fits in range(2):
        for twin in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
            assert len(twin.interventions) == fits
        guard = twin
        fit(task(), with_bad(4), guard)
    assert Keeps.ended == [(1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)]


def test_other_ranks_neither_write_nor_show_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Advice carries the id of the run, and only rank 0 has a file of it."""
    advice = Advice(0, 0, "preflight", Finding("dead_relu", 0.9))
    for rank, written in ((1, []), (0, [advice])):
        log = fit_advice(RunInfo(rank, 2, tmp_path, "one"))
        log.give(advice)
        assert log.given == [advice]
        found = [one for path in tmp_path.rglob("advice.jsonl") for one in read_file(path, Advice.from_dict)]
        assert found == written
        assert {one.run for one in (*found, *log.given)} == {"one"}
        assert [record.levelname for record in caplog.records] == ["WARNING"] * len(written)
    assert caplog.records[0].getMessage() == f"NaNGuard: {describe_advice(advice)}"
