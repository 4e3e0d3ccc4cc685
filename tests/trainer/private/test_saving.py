"""Every save is looked at before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard.trainer.private import saving
from tests.helpers import batches, fit, task


@pytest.mark.parametrize("collects", [False, True])
def test_what_is_called_around_a_save(collects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the trainer the state is made good first; a dictionary given to the strategy is mended, and only where
    the strategy collects by itself is the state looked at there too. The undo leaves nothing behind."""
    trainer = fit(task(), batches(count=2), folder=tmp_path).trainer
    said: list[str] = []

    def mend(checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        said.append(f"mend {Path(path).name} {checked}")
        return {**checkpoint, "mended": True}

    monkeypatch.setattr(saving, "collects", lambda trainer: collects)
    undo = saving.guard_saves(trainer, lambda: said.append("before"), mend, lambda: said.append("after"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert said == ["before", "mend one.ckpt True", "after"]
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["mended"]
    said.clear()
    content = trainer._checkpoint_connector.dump_checkpoint()
    trainer.strategy.save_checkpoint(content, tmp_path / "two.ckpt")
    assert said == (["before", "mend two.ckpt True", "after"] if collects else ["mend two.ckpt False"])
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["mended"]
    said.clear()
    with pytest.raises(OSError, match="File exists"):
        trainer.save_checkpoint(tmp_path / "one.ckpt" / "below")
    assert said == ["before", "mend below True", "after"]
    undo()
    said.clear()
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    assert said == []
    assert "save_checkpoint" not in {*vars(trainer), *vars(trainer.strategy)}
