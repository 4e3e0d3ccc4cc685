"""`nanguard last-good` prints the newest good checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import LAST_GOOD
from tests.helpers import batches, fit, task

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


def test_a_folder_of_shards_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index of one is a pickle: the command says so and goes on to other files."""
    (tmp_path / "run" / LAST_GOOD).mkdir(parents=True)
    assert main(["last-good", str(tmp_path)]) == 2
    assert "folder of shards, and its index is a pickle" in capsys.readouterr().err


def test_the_command_finds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one it says how to have one, and names the newest good checkpoint there is."""
    good = tmp_path / "run" / "checkpoints" / "step=12.ckpt"
    fit(task(), batches(), NaNGuard()).trainer.save_checkpoint(good)
    capsys.readouterr()
    assert main(["last-good", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "last_good_every_n_steps" in shown.err
    assert str(good) in shown.err
