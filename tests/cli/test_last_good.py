"""`nanguard last-good` prints the newest good checkpoint of a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import LAST_GOOD
from tests.helpers import Positioned, batches, fit, task, trainer_for

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the newest good file's path and nothing else, for `ckpt_path`; one that is cut short is passed over."""
    for name in ("one", "two"):
        guard = NaNGuard(dirpath=tmp_path / "runs" / name / "nanguard", last_good_every_n_steps=5)
        fit(task(), batches(), guard)
    older, newest = (tmp_path / "runs" / name / "nanguard" / LAST_GOOD for name in ("one", "two"))
    capsys.readouterr()
    assert main(["last-good", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{newest}\n"
    assert "whole and finite" in shown.err
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert main(["last-good", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"{older}\n"


def test_it_is_the_file_that_resuming_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command and `resume="last-good"` go on from the same file: the newest good one of the run, whoever saved it,
    also where it lies in a folder that neither is asked for; an older certified one is named."""
    folder, elsewhere = tmp_path / "run" / "nanguard", tmp_path / "elsewhere"
    guard = NaNGuard(dirpath=folder, last_good_every_n_steps=5)
    saver = ModelCheckpoint(dirpath=elsewhere, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = trainer_for(tmp_path, guard, [saver], enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(task(), Positioned(batches()), Positioned(batches()))
    asked = elsewhere / "step=8.ckpt"
    asked.write_bytes(asked.read_bytes()[:-1000])
    capsys.readouterr()
    assert main(["last-good", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{elsewhere / 'step=12.ckpt'}\n"
    assert f"The state in {folder / LAST_GOOD} (step 10) was certified" in shown.err
    for age, file in enumerate(["step=12.ckpt", "step=8.ckpt", "step=4.ckpt"]):
        os.utime(elsewhere / file, (age, age))  # as after a copy
    assert main(["last-good", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{elsewhere / 'step=12.ckpt'}\n"
    again = NaNGuard(dirpath=folder, resume="last-good")
    saver = ModelCheckpoint(dirpath=elsewhere, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    resumed = trainer_for(tmp_path, again, [saver], enable_checkpointing=True, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        resumed.fit(task(), Positioned(batches()), Positioned(batches()), ckpt_path=asked)
    assert resumed.ckpt_path == str(elsewhere / "step=12.ckpt")
    assert again.run_id == guard.run_id


def test_what_was_trained_again_is_newer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was resumed from an earlier step, in the same folder or in another one, goes on from what it saved
    after that, although an older file has a higher step; also if all files have got a new time."""
    saved = tmp_path / "saved"
    guard, resume = NaNGuard(dirpath=tmp_path / "a"), None
    for part, steps in (("a", 16), ("a", 9), ("b", 10)):
        guard = NaNGuard(dirpath=tmp_path / part)
        saver = ModelCheckpoint(dirpath=saved, every_n_train_steps=1, save_top_k=-1, filename=f"{part}{steps}-{{step}}")
        trainer = trainer_for(
            tmp_path, guard, [saver], enable_checkpointing=True, limit_val_batches=0, max_epochs=2, max_steps=steps
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(task(), Positioned(batches()), Positioned(batches()), ckpt_path=resume)
        resume = saved / "a16-step=5.ckpt"
    for age, file in enumerate(sorted(saved.iterdir())):
        os.utime(file, (1000 - age, 1000 - age))
    capsys.readouterr()
    for expected in ("b10-step=10", "a9-step=9", "a16-step=16"):
        assert main(["last-good", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{saved / expected}.ckpt\n"
        for file in saved.glob(f"{expected.partition('-')[0]}-*"):
            file.unlink()


def test_a_folder_of_shards_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index of one is a pickle: the command says so and goes on to other files."""
    (tmp_path / "run" / LAST_GOOD).mkdir(parents=True)
    assert main(["last-good", str(tmp_path)]) == 2
    assert "folder of shards, and its index is a pickle" in capsys.readouterr().err


def test_the_command_finds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good checkpoint that is in no run's log is printed and said to be so; without any it says how to have one."""
    good = tmp_path / "run" / "checkpoints" / "step=12.ckpt"
    fit(task(), batches(), NaNGuard()).trainer.save_checkpoint(good)
    capsys.readouterr()
    assert main(["last-good", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{good}\n"
    assert "in no run's log" in shown.err
    good.unlink()
    assert main(["last-good", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "last_good_every_n_steps" in shown.err
