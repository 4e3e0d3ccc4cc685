"""Two ranks that train on data with bad samples; each writes what it saw to ``OUT/rank<r>.json``."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, read_bad_samples
from tests.helpers import folder_of, trainer_for
from tests.scenarios.one_percent import LogModel, spoilt


class Sizes(Callback):
    """Counts samples by epoch."""

    def __init__(self) -> None:
        self.batches: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.batches.setdefault(trainer.current_epoch, []).append(len(batch[0]))


class Said(logging.Handler):
    """Keeps what the console is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one_fit(folder: Path, name: str, size: int, ckpt: Path | None = None, **options: Any) -> Mapping[str, Any]:
    """One fit; what this rank saw of it."""
    sizes, said = Sizes(), Said()
    logging.getLogger("lightning_nanguard").addHandler(said)
    guard = NaNGuard(dirpath=folder / name, quarantine=True)
    options = {"max_epochs": 3, "devices": 2, "strategy": "ddp"} | options
    trainer = trainer_for(folder, guard, [sizes], **options)
    torch.manual_seed(1)
    trainer.fit(LogModel(), DataLoader(spoilt(), batch_size=size, shuffle=True), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    logging.getLogger("lightning_nanguard").removeHandler(said)
    file = folder_of(guard) / BAD_SAMPLES_FILE
    trainer.strategy.barrier()
    return {
        "listed": [[one.row, one.epoch, one.rank] for one in read_bad_samples(file)] if file.exists() else [],
        "epochs": [one.epoch for one in guard.interventions],
        "ranks": [one.finding.evidence.get("rank") for one in guard.interventions if one.finding and one.finding.rows],
        "sizes": {str(epoch): [len(count), sum(count)] for epoch, count in sizes.batches.items()},
        "weights": [float(one.detach().sum()) for one in trainer.lightning_module.parameters()],
        "said": said.lines,
    }


def main(folder: Path) -> None:
    """All fits, in each rank."""
    warnings.filterwarnings("ignore")
    seen = {
        "small": one_fit(folder, "small", 16),
        "accumulated": one_fit(folder, "accumulated", 16, accumulate_grad_batches=2),
        "large": one_fit(folder, "large", 128),
        "first": one_fit(folder, "first", 16, max_epochs=1),
    }
    seen["resumed"] = one_fit(folder, "resumed", 16, folder / "first.ckpt", max_epochs=2)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
