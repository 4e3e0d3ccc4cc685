"""The page of comparisons says what a trial shows, and hides no row in which another tool is ahead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks.spike import SpikeDetection
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard

PAGE = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


class Linear(LightningModule):
    """A linear model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.layer(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def state(tensors: Any) -> str:
    """How the page calls these tensors."""
    return "finite" if all(bool(one.isfinite().all()) for one in tensors) else "NaN"


WAYS: dict[str, tuple[Callable[[Path], list[Callback]], dict[str, Any]]] = {
    "no guard": (lambda folder: [], {}),
    "`gradient_clip_val=1.0`": (lambda folder: [], {"gradient_clip_val": 1.0}),
    "`EarlyStopping(check_finite=True)`": (
        lambda folder: [EarlyStopping("loss", check_finite=True, check_on_train_epoch_end=True)],
        {"max_epochs": 2},
    ),
    "`SpikeDetection()`": (lambda folder: [SpikeDetection(exclude_batches_path=str(folder))], {}),
    "`detect_anomaly=True`": (lambda folder: [], {"detect_anomaly": True}),
    "`NaNGuard()`": (lambda folder: [NaNGuard()], {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_row(way: str, tmp_path: Path) -> None:
    """Each way ends, and leaves weights and a checkpoint, as its row says."""
    [expected] = [cells[1:] for cells in rows("One bad row, tried") if cells[0] == way]
    inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    targets = inputs.sum(1, keepdim=True)
    inputs[20, 2] = torch.nan
    make, options = WAYS[way]
    callbacks = make(tmp_path)
    saved = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    module, quiet = Linear(), {**quiet, "accelerator": "cpu", "default_root_dir": tmp_path, "max_epochs": 1}
    trainer = Trainer(callbacks=[*callbacks, saved], **{**quiet, **options})
    ends = "normally"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=8))
        except Exception:
            ends = f"exception {'after' if trainer.global_step > 2 else 'before'} the step"
    if trainer.max_epochs == 2 and trainer.current_epoch == 1:
        ends = "stopped at the end of the epoch"
    for guard in callbacks:
        if isinstance(guard, NaNGuard):
            ends += f", {10 - len(guard.interventions)} of 10 batches learned"
    path = tmp_path / "last.ckpt"
    file = state(torch.load(path, weights_only=True)["state_dict"].values()) if path.exists() else "–"
    assert [ends, state(module.parameters()), file] == expected


def test_every_way_is_tried() -> None:
    """The table has no row that the test does not repeat."""
    assert [cells[0] for cells in rows("One bad row, tried")[1:]] == list(WAYS)


def test_a_row_in_which_another_is_ahead_says_so() -> None:
    """Where another tool has more than NaNGuard, the last column names it and the reason; elsewhere it is empty."""
    rank = {"–": 0, "◐": 1, "●": 2}
    head, *points = rows("Point by point")
    assert len(points) >= 20
    for cells in points:
        assert len(cells) == len(head), cells[0]
        own, *others = (rank[cell] for cell in cells[1:-1])
        ahead = [name for name, other in zip(head[2:-1], others, strict=True) if other > own]
        assert bool(ahead) == bool(cells[-1]), cells[0]
        if ahead:
            assert any(name in cells[-1] for name in ahead), cells[0]
            assert ": " in cells[-1], cells[0]


def test_every_tool_has_a_source() -> None:
    """Each column is backed by a link."""
    sources = {cells[0]: cells[1] for cells in rows("Sources")[1:]}
    assert list(sources) == rows("Point by point")[0][2:-1]
    assert all(re.search(r"\]\(https://", text) for text in sources.values())
