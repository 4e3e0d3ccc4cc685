"""Whether a checkpoint file is whole and good."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard.checkpoints.inspection import Inspection, damage, inspect, newest_good, run_of_file
from lightning_nanguard.checkpoints.poison import KnownWeights
from tests.checkpoints.training import BAD


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_a_file(kind: str, saved: Callable[..., Path]) -> None:
    """A good file is told from a poisoned and from a torn one, and what is wrong is said."""
    path = saved(9)
    run = run_of_file(path)
    assert run
    assert inspect(path) == Inspection(path, global_step=9, whole_run=True, run=run)
    assert inspect(path).good()
    spoil, message = BAD[kind]
    spoil(path)
    found = inspect(path)
    assert not found.good()
    assert re.search(message.replace(" is not finite", ""), found.damage + " ".join(found.tensors))


@pytest.mark.parametrize(
    ("content", "said"),
    [([1], "it holds no state_dict"), ({"state_dict": {}, "x": object}, "it cannot be read (UnpicklingError")],
)
def test_what_is_no_checkpoint(content: Any, said: str, tmp_path: Path) -> None:
    """A file that is no checkpoint, or would run code when read, is no file to resume from."""
    torch.save(content, tmp_path / "one.ckpt")
    assert inspect(tmp_path / "one.ckpt").damage.startswith(said)


def test_masks_by_name_and_by_allowance(tmp_path: Path) -> None:
    """Without the module, −inf is allowed in what is a mask by its name; with it, where the module has it."""
    path, mask = tmp_path / "one.ckpt", torch.tensor([0.0, -math.inf])
    torch.save({"state_dict": {"mask": mask, "w": mask}}, path)
    assert inspect(path).tensors == ("state_dict: w",)
    weights = {"mask": mask, "w": mask}
    assert inspect(path, KnownWeights(weights, {("buffer", "w"): mask == -math.inf})).tensors == ("state_dict: mask",)


def test_the_newest_good_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Files are taken by their step, whatever their time; bad ones, weights alone, and the one not wanted are passed
    over. Of two with the same step, the one that was written last is taken."""
    folder = saved(5, 9, 16).parent
    for name, age in {"5": 3, "9": 2, "16": 1}.items():
        os.utime(folder / f"{name}.ckpt", (age, age))
    torch.save({"state_dict": {}, "global_step": 99}, folder / "weights.ckpt")
    (folder / "shards.ckpt").mkdir()
    (folder / "empty.ckpt").touch()
    found = newest_good([folder, tmp_path / "none"])
    assert found is not None
    assert found.global_step == 16
    assert newest_good([folder], run=found.run) == found
    assert newest_good([folder], run="another") is None
    found = newest_good([folder], other_than=folder / "16.ckpt")
    assert found is not None
    assert found.global_step == 9
    shutil.copy(folder / "16.ckpt", folder / "copied.ckpt")
    assert getattr(newest_good([folder]), "path", None) == folder / "copied.ckpt"
    assert newest_good([tmp_path / "none"]) is None


def test_a_folder_is_not_called_damaged(tmp_path: Path) -> None:
    """A sharded checkpoint is a folder, of which nothing can be told here; it is not called damaged."""
    assert damage(tmp_path) == ""
    assert "folder of shards" in inspect(tmp_path).damage
