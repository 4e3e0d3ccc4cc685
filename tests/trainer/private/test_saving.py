"""A look at the state before every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_nanguard.trainer.private.saving import guard_saves
from tests.helpers import batches, fit, task


def test_a_save_is_looked_at_mended_and_told(tmp_path: Path) -> None:
    """The state is looked at before it is collected, the dictionary before it is written; undone, nothing is."""
    run = fit(task(), batches(count=1))
    order: list[str] = []

    def mend(checkpoint: dict[str, Any], path: str, *, checked: bool = False) -> dict[str, Any]:
        order.append(f"mend {Path(path).name} {checked}")
        return {**checkpoint, "mended": True}

    undo = guard_saves(run.trainer, lambda: order.append("look"), mend, lambda: order.append("done"))
    run.trainer.save_checkpoint(tmp_path / "a.ckpt")
    run.trainer.strategy.save_checkpoint({"own": 1}, tmp_path / "b.ckpt")
    assert order == ["look", "mend a.ckpt True", "done", "mend b.ckpt False"]
    assert torch.load(tmp_path / "b.ckpt", weights_only=True) == {"own": 1, "mended": True}
    undo()
    run.trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert len(order) == 4
    assert "mended" not in torch.load(tmp_path / "c.ckpt", weights_only=True)
