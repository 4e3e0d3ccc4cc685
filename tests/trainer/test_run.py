"""Each fit has an id and a folder of its own under every logger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_nanguard import BadCheckpointError, NaNGuard
from lightning_nanguard.checkpoints.inspection import run_of_file
from lightning_nanguard.record.base import RunInfo
from lightning_nanguard.record.curve import CURVE_FILE
from lightning_nanguard.record.files import LAST_GOOD, RECORDS_FILE, read_records
from lightning_nanguard.record.run_log import RUN_FILE, earlier_parts, read_run
from lightning_nanguard.trainer.run import open_run
from tests.checkpoints.training import cut, poison
from tests.helpers import MemoryLogger, batches, fit, folder_of, task, trainer_for, with_bad

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Named(MemoryLogger):
    """A logger with a name and a version of the run, as W&B's and MLflow's, and a folder that runs share."""

    def __init__(self, name: Any, version: Any, save_dir: Path | None) -> None:
        super().__init__()
        self.given = name, version, save_dir

    name = property(lambda self: self.given[0])  # type: ignore[assignment]
    version = property(lambda self: self.given[1])  # type: ignore[assignment]
    save_dir = property(lambda self: self.given[2])  # type: ignore[assignment]


class Failing(MemoryLogger):
    @property
    def version(self) -> int:
        raise RuntimeError("no connection")


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda root: CSVLogger(root, "runs", "seven"), "runs/seven/nanguard"),
        (lambda root: Named("project", "x3f9", root / "w"), "w/project/x3f9/nanguard"),
        (lambda root: Named("7", "x3f9", None), "root/7/x3f9/nanguard"),
        (lambda root: Named("name", 2, None), "root/name/version_2/nanguard"),
        (lambda root: Named("name", None, None), "root/nanguard/{id}"),
        (lambda root: Failing(), "root/nanguard/{id}"),
        (lambda root: False, "root/nanguard/{id}"),
    ],
)
def test_the_folder_under_each_logger(logger: Any, folder: str, tmp_path: Path) -> None:
    """It lies beside the checkpoints, where Lightning's ModelCheckpoint puts them; where runs share that, by the id."""
    trainer = trainer_for(tmp_path / "root", logger=logger(tmp_path))
    info, run = open_run(trainer, None)
    run.log("end")
    run.close()
    assert info == RunInfo(0, 1, tmp_path / folder.format(id=run.run_id), run.run_id)
    assert run.path == info.dirpath
    again, run = open_run(trainer, None)
    run.close()
    assert again.dirpath not in (info.dirpath, info.dirpath.parent)


def test_a_folder_in_a_bucket(tmp_path: Path) -> None:
    """Where Lightning's files lie in a bucket, records lie in the working directory."""
    info, run = open_run(trainer_for("s3://bucket/runs", logger=False), None)
    run.close()
    assert info.dirpath.resolve().parent == tmp_path / "nanguard"


def test_a_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    """With fast_dev_run a healthy run leaves no file of the guard's."""
    fit(task(), batches(count=4), NaNGuard(), folder=tmp_path / "root", fast_dev_run=True)
    assert list(tmp_path.rglob("*")) == []


def resumable(root: Path, checkpoint: Path | None = None, *bad: int, epochs: int = 1) -> NaNGuard:
    """A run without a logger that keeps its last good state and saves `last.ckpt`."""
    guard = NaNGuard(last_good_every_n_steps=4, snapshot_every_n_steps=2, resume="last-good")
    saves = ModelCheckpoint(root / "checkpoints", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": True, "max_epochs": epochs}
    trainer = trainer_for(root, guard, [saves], **options)
    data = DataLoader(with_bad(*bad, count=12), batch_size=None)
    trainer.limit_val_batches = 0
    trainer.fit(task(), data, data, ckpt_path=checkpoint)
    return guard


def test_runs_do_not_mix_and_are_continued(tmp_path: Path) -> None:
    """Two runs with one root folder have folders, records, last good files and checkpoints of their own; a run that
    goes on from a checkpoint has its id and writes where that wrote."""
    one, two = resumable(tmp_path, None, 4), resumable(tmp_path, None, 5, 8)
    assert one.run_dir is not None
    assert two.run_dir is not None
    assert one.run_dir.parent == two.run_dir.parent == tmp_path / "nanguard"
    for guard, count in ((one, 1), (two, 2)):
        assert guard.run_dir is not None
        records = read_records(guard.run_dir / "interventions.jsonl")
        assert [record.run for record in records] == [guard.run_id] * count
        assert [record.run for record in guard.interventions] == [guard.run_id] * count
        assert run_of_file(guard.run_dir / LAST_GOOD) == guard.run_id
        log = read_run(guard.run_dir)
        assert log is not None
        assert log.saved_by(guard.run_dir / LAST_GOOD) is not None
    last = one.run_dir / LAST_GOOD
    (two.run_dir / f"{LAST_GOOD}.pending").write_text("of a live run")
    again = resumable(tmp_path, last, 4, epochs=2)
    assert (again.run_id, again.run_dir) == (one.run_id, one.run_dir)
    assert {record.run for record in read_records(one.run_dir / "interventions.jsonl")} == {one.run_id}
    assert (two.run_dir / f"{LAST_GOOD}.pending").exists()


def test_a_logger_with_a_new_folder_for_a_resumed_run(tmp_path: Path) -> None:
    """The run keeps its id, and its log says where it lay before."""
    guards = []
    checkpoint = tmp_path / "logs" / "a" / "checkpoints" / "end.ckpt"
    for version, epochs, path in (("a", 1, None), ("b", 2, checkpoint)):
        guard = NaNGuard()
        trainer = trainer_for(tmp_path, guard, logger=CSVLogger(tmp_path, "logs", version), max_epochs=epochs)
        data = DataLoader(with_bad(4, count=12), batch_size=None)
        trainer.limit_val_batches = 0
        trainer.fit(task(), data, data, ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(checkpoint)
        guards.append(guard)
    first, second = map(folder_of, guards)
    assert guards[0].run_id == guards[1].run_id
    assert first != second
    log = read_run(second)
    assert log is not None
    assert [part.folder for part in earlier_parts(log)] == [first]


@pytest.mark.parametrize("spoil", [poison, cut, Path.unlink])
def test_last_good_never_takes_another_runs(spoil: Any, tmp_path: Path) -> None:
    """With resume="last-good" a run goes on from its own newest file, not from the newer one of another run in the same
    folders, whether its file can be read or not; where all its own are gone it is refused and the other one named."""
    one = resumable(tmp_path)
    own = tmp_path / "checkpoints" / "step=10.ckpt"
    older = own.with_name("step=5.ckpt")
    two = resumable(tmp_path)
    newest = own.with_name("step=10-v1.ckpt")
    assert (run_of_file(own), run_of_file(newest)) == (one.run_id, two.run_id)
    assert one.run_dir is not None
    spoil(own)
    again = resumable(tmp_path, own, epochs=2)
    assert again.run_id == one.run_id
    (record,) = again.interventions
    assert str(one.run_dir / LAST_GOOD) in record.message
    for file in (one.run_dir / LAST_GOOD, older, *tmp_path.glob("checkpoints/*.ckpt")):
        if (file != own or spoil is Path.unlink) and run_of_file(file) == one.run_id:
            file.unlink()
    if spoil is Path.unlink:
        with pytest.raises(FileNotFoundError, match="not found"):
            resumable(tmp_path, own)
        return
    with pytest.raises(BadCheckpointError, match="There is no other good checkpoint of its run near it") as refused:
        resumable(tmp_path, own)
    assert refused.value.offered is None


def test_a_file_of_no_known_run(tmp_path: Path) -> None:
    """A torn file that no run says it saved is not replaced by another run's; that one is offered by name."""
    two = resumable(tmp_path)
    torn = tmp_path / "checkpoints" / "moved.ckpt"
    torn.write_bytes((tmp_path / "checkpoints" / "step=10.ckpt").read_bytes()[:1000])
    with pytest.raises(BadCheckpointError, match="no log of a run names it") as refused:
        resumable(tmp_path, torn)
    for words in (
        f"does not resume from {torn}, because it is bad: it is cut short",
        "What to do: if you know that both",
    ):
        assert words in str(refused.value)
    assert run_of_file(refused.value.offered) == two.run_id
    assert torch.load(refused.value.offered, weights_only=True)["global_step"] == 10


class Leaves(Callback):
    """Changes the working directory in mid-run, as the user's code may."""

    def __init__(self, to: Path) -> None:
        self.to = to

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        os.chdir(self.to)


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of a run lie in one folder, the one that a relative path named when the run began."""
    pytest.importorskip("safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    guard = NaNGuard(dirpath="rel/run", bundle_dir="incidents", last_good_every_n_steps=4)
    fit(task(), with_bad(9), guard, callbacks=[Leaves(elsewhere)], logger=False, folder=tmp_path / "root")
    assert guard.run_dir == tmp_path / "rel" / "run"
    assert {RUN_FILE, RECORDS_FILE, CURVE_FILE, LAST_GOOD} <= {file.name for file in folder_of(guard).iterdir()}
    assert list((tmp_path / "incidents").iterdir())
    assert not list(elsewhere.iterdir())


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, the warning says what is wrong, and the summary does not point to records that are not there."""
    (tmp_path / "runs").write_text("a file")
    guard = NaNGuard(dirpath=tmp_path / "runs")
    fit(task(), with_bad(9), guard, logger=False, folder=tmp_path / "root")
    assert f"{tmp_path / 'runs'} is a file: choose a folder" in caplog.text
    assert "1 batch skipped" in guard.summary()
    assert "nanguard explain" not in guard.summary()
