"""The commands of ``docs/bad_data.md`` do what the page says."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from lightning_nanguard.cli.main import main
from tests.scenarios.one_percent import BAD, NOT_FINITE, guard_of
from tests.scenarios.test_bad_samples import shuffled, spoilt, train

PAGE = (Path(__file__).parents[2] / "docs" / "bad_data.md").read_text(encoding="utf-8")
DATA = """
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 2048

    def __getitem__(self, row):
        if row == 951:
            raise OSError("broken file")
        x = torch.randn(3, 30 if row == 812 else 32, generator=torch.Generator().manual_seed(row))
        if row == 100:
            x[2] = torch.nan
        if row == 333:
            x[:] = 1e15
        return x, row % 10

def make_loader(split):
    return DataLoader(Rows(), batch_size=64, shuffle=split == "train")

class Digits(LightningDataModule):
    def train_dataloader(self):
        return make_loader("train")
"""


def commands(of: str) -> list[str]:
    """The commands of the page that begin so."""
    return re.findall(rf"^{of}.*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", commands("nanguard check"))
def test_check(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each names the four rows, in the words of the page."""
    (tmp_path / "data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "data", raising=False)
    assert main(shlex.split(command)[1:]) == 1
    said = [re.sub(r"^\w+(?=[,:])|\d\.\d+(?= in)", "", line) for line in capsys.readouterr().out.splitlines()]
    shown = [re.sub(r"^\w+(?=[,:])|\d\.\d+(?= in)", "", line) for line in re.findall(r"^train[,:].*$", PAGE, re.M)]
    assert sorted(said) == sorted(shown)


def test_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways to list the bad samples of a run."""
    guard = guard_of(tmp_path)
    train(shuffled(spoilt(), 32), tmp_path, guard, max_epochs=1)
    listing, table = (one.split(">")[0].replace("RUN_DIR", str(guard.run_dir)) for one in commands("nanguard samples"))
    capsys.readouterr()
    assert main(shlex.split(listing)[1:]) == 0
    said = capsys.readouterr().out
    assert all(f"row {row}: not finite" in said for row in NOT_FINITE)
    assert main(shlex.split(table)[1:]) == 0
    rows = {int(row["row"]) for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert NOT_FINITE <= rows <= set(BAD)
