"""Draws the picture in the README: the loss of one run with and without ``NaNGuard()``.

    python examples/picture.py [--fast] [--output docs/rescued.png]

The run is that of ``demo.py``: handwritten digits at a learning rate twenty times too high.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo import HIGH_LR
from digits import DigitsClassifier, DigitsDataModule, pl
from matplotlib.figure import Figure

from lightning_nanguard import Intervention, NaNGuard

HIGHEST = 100.0
"""Where the axis of the loss ends."""


class Losses(pl.Callback):
    """Keeps the training loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        # A skipped batch has no loss.
        self.values.append(math.nan if outputs is None else float(outputs["loss"]))


def train(epochs: int, guard: NaNGuard | None) -> list[float]:
    """The loss of every batch of a run at a rate that is far too high."""
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        callbacks=[losses] if guard is None else [guard, losses],
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsClassifier(lr=HIGH_LR), DigitsDataModule())
    return losses.values


def draw(bare: Sequence[float], guarded: Sequence[float], interventions: Sequence[Intervention]) -> Figure:
    """Both losses over the batches, and where the guard intervened."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="batch", ylabel="training loss", ylim=(0.01, HIGHEST))
    axes.plot(guarded, color="tab:blue", lw=1, label="with NaNGuard: learns on")
    end = next((batch for batch, loss in enumerate(bare) if not loss < HIGHEST), len(bare))
    lost = [*bare[:end], HIGHEST] if end < len(bare) else bare
    axes.plot(lost, color="tab:red", lw=2, label="without: NaN, to the end of the run")
    for one in interventions:
        axes.axvline(one.global_step - 1, color="0.5", lw=0.8, ls=":", zorder=0)
        axes.annotate(
            ", ".join(one.remedies), (one.global_step - 1, 0.012), (4, 0), textcoords="offset points", fontsize=8
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, len(guarded))
    axes.legend(frameon=False, loc="upper right")
    return figure


def main() -> None:
    """Train twice, draw once."""
    parser = argparse.ArgumentParser(description="Draw the loss of one run with and without the guard.")
    parser.add_argument("--fast", action="store_true", help="two epochs in place of twelve")
    parser.add_argument("--output", type=Path, default=Path("docs/rescued.png"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    guard = NaNGuard()
    epochs = 2 if arguments.fast else 12
    bare, guarded = train(epochs, None), train(epochs, guard)
    draw(bare, guarded, guard.interventions).savefig(arguments.output, dpi=150)
    print(f"{arguments.output} written: {len(guard.interventions)} interventions")


if __name__ == "__main__":
    main()
