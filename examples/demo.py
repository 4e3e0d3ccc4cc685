"""Two failing training runs, each without and with ``NaNGuard()``, and a healthy one.

    make demo        or        python examples/demo.py [--fast] [--json results.json]

A classifier learns the handwritten digits that come with scikit-learn: first at a learning rate twenty times too high,
then from data in which three images are corrupt. The demo takes less than a minute on a laptop, and needs no GPU and no
download.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import operator
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from digits import DigitsClassifier, DigitsDataModule, pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_nanguard import NaNGuard, TrainingDivergedError

GOOD_LR = 0.05
HIGH_LR = 20 * GOOD_LR
WORDS = {
    "skip": "skipped",
    "restore": "rollback",
    "clip": "clipping",
    "scale": "rate cut",
    "give back": "rate up",
}


@dataclass(frozen=True)
class Result:
    """How one run ended. A number that is not finite is ``None``, because JSON cannot hold it."""

    run: str
    guarded: bool
    accuracy: float
    loss: float | None
    remedies: dict[str, int]
    interventions: int
    lr_before: float
    lr_lowest: float
    lr_after: float
    stopped: str | None
    records: str | None


class ShowProgress(pl.Callback):
    """Moves a bar of rich's display forward with every batch."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress = progress
        self.task = task

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.progress.update(self.task, total=trainer.max_epochs * trainer.num_training_batches)

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)


def held_out(model: torch.nn.Module, data: DigitsDataModule) -> tuple[float, float]:
    """Accuracy and loss of the final weights on the images the model has not seen."""
    images, targets = data.held_out.tensors
    with torch.no_grad():
        logits = model.eval()(images)
    accuracy = (logits.argmax(dim=1) == targets).float().mean().item()
    return accuracy, torch.nn.functional.cross_entropy(logits, targets).item()


def lowest_multiplier(interventions: list[Any]) -> float:
    """The lowest learning-rate multiplier of the run; at the end it may be higher again."""
    cuts = [record.lr_after / record.lr_before for record in interventions if record.lr_before and record.lr_after]
    return min(accumulate(cuts, operator.mul, initial=1.0))


def train(run: str, *, lr: float, corrupt: int, guarded: bool, epochs: int, dirpath: Path, show: Any) -> Result:
    """One run. Every run has the same seed, so that the runs differ only in these arguments."""
    pl.seed_everything(0, verbose=False)
    model, data = DigitsClassifier(lr=lr), DigitsDataModule(corrupt=corrupt)
    guard = NaNGuard() if guarded else None
    name = f"{run} {'with NaNGuard' if guarded else 'bare'}".replace(" ", "-")
    trainer = pl.Trainer(
        callbacks=[show] if guard is None else [guard, show],
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(dirpath, name=name),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stopped = None
    try:
        trainer.fit(model, data)
    except TrainingDivergedError as error:
        stopped = str(error)
    accuracy, loss = held_out(model, data)
    interventions = [] if guard is None else list(guard.interventions)
    records = None if guard is None else Path(trainer.log_dir) / "nanguard" / "interventions.jsonl"
    return Result(
        run=run,
        guarded=guarded,
        accuracy=accuracy,
        loss=loss if math.isfinite(loss) else None,
        remedies=dict(Counter(remedy for record in interventions for remedy in record.remedies)),
        interventions=len(interventions),
        lr_before=lr,
        lr_lowest=lr * lowest_multiplier(interventions),
        lr_after=lr if guard is None else lr * guard.lr_multiplier,
        stopped=stopped,
        records=str(records) if records is not None and records.exists() else None,
    )


def table(results: list[Result]) -> Table:
    """The results side by side."""
    view = Table(
        title="Handwritten digits: 450 held-out images", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    view.add_column("run", no_wrap=True)
    view.add_column("guard")
    view.add_column("accuracy", justify="right")
    view.add_column("loss", justify="right")
    view.add_column("what it did", no_wrap=True)
    for name in ("rate set", "lowest", "end"):
        view.add_column(name, justify="right")
    for result in results:
        rates = (result.lr_before, result.lr_lowest, result.lr_after)
        done = [f"{count} x {WORDS.get(remedy, remedy)}" for remedy, count in result.remedies.items()]
        view.add_row(
            result.run,
            "yes" if result.guarded else "no",
            f"[{'green' if result.accuracy > 0.9 else 'red'}]{result.accuracy:.1%}",
            "[red]nan" if result.loss is None else f"{result.loss:.2f}",
            "\n".join(done) or "-",
            *(f"{lr:.3g}" for lr in rates),
            end_section=result.guarded or result.run == "healthy",
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="half as many epochs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--dir", type=Path, default=Path("demo_logs"), help="where the logs and records go")
    args = parser.parse_args()

    # The display shows the results, so Lightning's own messages are switched off.
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    torch.set_num_threads(1)  # the model is too small to gain from more

    runs = [
        ("healthy", GOOD_LR, 0, False),
        ("rate 20 x too high", HIGH_LR, 0, False),
        ("rate 20 x too high", HIGH_LR, 0, True),
        ("3 corrupt images", GOOD_LR, 3, False),
        ("3 corrupt images", GOOD_LR, 3, True),
    ]
    console = Console()
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for run, lr, corrupt, guarded in runs:
            task = progress.add_task(f"{run}, {'NaNGuard()' if guarded else 'bare'}", total=None)
            results.append(
                train(
                    run,
                    lr=lr,
                    corrupt=corrupt,
                    guarded=guarded,
                    epochs=6 if args.fast else 12,
                    dirpath=args.dir,
                    show=ShowProgress(progress, task),
                )
            )
    console.print(table(results))
    for result in results:
        if result.stopped is not None:
            console.print(f"{result.run}: stopped. {result.stopped}", markup=False)
        if result.records is not None:
            console.print(f"{result.run}: what the guard did is in\n  {result.records}", markup=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
