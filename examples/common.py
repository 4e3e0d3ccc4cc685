"""Helpers of the small examples: train without output and return the losses, and print what the guard found."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch
from digits import DigitsDataModule, pl

from lightning_nanguard import Finding, NaNGuard, TrainingDivergedError

# The examples print their results themselves, so the logs are switched off.
for name in ("pytorch_lightning", "lightning.pytorch", "lightning_nanguard"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "You passed in a `val_dataloader` but have no `validation_step`")
torch.set_num_threads(1)  # the models are too small to gain from more


class Losses(pl.Callback):
    """Keeps the loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def train(module: Any, data: Any, guard: NaNGuard | None = None, **options: Any) -> list[float]:
    """Fit and return the loss of every batch. All files are written to a folder that is deleted afterwards."""
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[losses] if guard is None else [guard, losses],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            logger=False,
            **options,
        )
        try:
            trainer.fit(module, data)
        except TrainingDivergedError as error:
            print(f"  stopped: {error}")
    return losses.seen


def tell(guard: NaNGuard, at_most: int = 2) -> None:
    """Print the guard's advice and the causes of its interventions, once each; what follows from them last."""
    last = ("skipped batches", "a finite suspicion")
    findings = [one.finding for one in guard.advice if one.occasion not in last]
    findings += [one.finding for one in guard.interventions]
    findings += [one.finding for one in guard.advice if one.occasion in last]
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding is not None:
            first.setdefault(finding.cause, finding)
    for cause, finding in list(first.items())[:at_most]:
        print(f"  cause: {cause} in {finding.place or 'the model'}\n         {finding.suggestion}")


def accuracy(module: torch.nn.Module, data: DigitsDataModule) -> float:
    """Share of the held-out digits that the model recognises."""
    images, targets = data.held_out.tensors
    with torch.no_grad():
        return float((module(images).argmax(1) == targets).float().mean())
