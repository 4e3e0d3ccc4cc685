"""A long run of cheap steps with a fault now and then: does anything grow? ``python -m benchmarks.long_run``.

Memory, the time of a step and the sizes of the files are read in each tenth of the run. Afterwards ``nanguard explain``
and ``nanguard report`` are timed on what it left. Lightning's own loop takes most of the time of a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.transient.running import quiet
from lightning_nanguard import NaNGuard

FAULTS = ("loss", "weight", "gradient", "moment")
"""What is struck, in turn."""


@dataclass(frozen=True)
class Reading:
    """What was read at the end of a tenth of the run.

    Attributes:
        steps: Updates made.
        memory: Resident memory in MB.
        tensors: Number of tensors alive.
        step: Time of a step in ms, over the tenth, faults included.
        files: Size of all files of the run in kB.
        interventions: Interventions so far.
    """

    steps: int
    memory: float
    tensors: int
    step: float
    files: float
    interventions: int

    def row(self) -> str:
        """Its row in the table."""
        numbers = f"{self.memory:.0f} | {self.tensors} | {self.step:.3f} | {self.files:.0f} | {self.interventions}"
        return f"| {self.steps:,} | {numbers} |"


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same 64 batches again and again."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 16, 8, generator=generator)
        self.batches = list(zip(x, x @ torch.randn(8, 2, generator=generator), strict=True))
        self.steps = steps

    def __iter__(self) -> Any:
        return (self.batches[step % 64] for step in range(self.steps))


class Regression(pl.LightningModule):
    """A cheap model, struck at each ``every``-th step by a fault that its batch has for good, or that state has once.

    Args:
        every: Steps between two faults; 0 for none.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.every = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), every
        self.net[0].weight.register_hook(self._gradient)

    def _due(self, batch_idx: int) -> str:
        number, rest = divmod(batch_idx + 1, self.every) if self.every else (0, 1)
        return "" if rest or not number else FAULTS[number % len(FAULTS)]

    def _gradient(self, gradient: Tensor) -> Tensor | None:
        return gradient * math.inf if self.now == "gradient" else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.now = self._due(batch_idx)
        if self.now == "weight":
            self.net[2].weight.data[0, 0] = math.nan
        if self.now == "moment":
            self.trainer.optimizers[0].state[self.net[0].weight]["exp_avg_sq"][0, 0] = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return loss * math.nan if self.now == "loss" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Watch(pl.Callback):
    """Reads memory, time and sizes at the end of each tenth.

    Args:
        guard: Its interventions are counted.
        folder: Its files are measured.
        steps: Updates of the run.
    """

    def __init__(self, guard: NaNGuard | None, folder: Path, steps: int) -> None:
        self.guard, self.folder, self.tenth = guard, folder, max(1, steps // 10)
        self.readings: list[Reading] = []
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.tenth:
            return
        took = 1e3 * (time.perf_counter() - self._began) / self.tenth
        gc.collect()
        alive = sum(isinstance(one, Tensor) for one in gc.get_objects())
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        memory = psutil.Process().memory_info().rss / 1e6
        count = 0 if self.guard is None else self.guard.interventions.total
        self.readings.append(Reading(trainer.global_step, memory, alive, took, size / 1e3, count))
        print(self.readings[-1].row(), flush=True)  # a run that is interrupted has said what it found
        self._began = time.perf_counter()


def long_run(steps: int, every: int, folder: Path, *, guarded: bool = True) -> list[Reading]:
    """Train for so many steps, and say what was read in each tenth.

    Args:
        steps: Updates.
        every: Updates between two faults.
        folder: Where the guard's files go.
        guarded: Whether there is a guard.
    """
    guard = NaNGuard(dirpath=folder, last_good_every_n_steps=max(1, steps // 100)) if guarded else None
    watch = Watch(guard, folder, steps)
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[watch, *([] if guard is None else [guard])],
        )  # fmt: skip
        trainer.fit(Regression(every), DataLoader(Stream(steps), batch_size=None))
    return watch.readings


_KINDS: tuple[tuple[Any, str], ...] = ((max, "memory"), (max, "tensors"), (min, "step"))


def grown(readings: Sequence[Reading]) -> list[str]:
    """In words, what the end of the run has more of than its first half; what is bounded is full by then."""
    half, now = readings[: len(readings) // 2], readings[-1]
    memory, tensors, fastest = (pick(getattr(one, name) for one in half) for pick, name in _KINDS)
    wrong = []
    if now.memory > memory + 20:
        wrong.append(f"memory grew from {memory:.0f} to {now.memory:.0f} MB")
    # The updates since a snapshot are kept, with their random states: some hundred more or fewer say nothing.
    if now.tensors > 2 * tensors + 50:
        wrong.append(f"{now.tensors} tensors are alive, {tensors} were")
    if min(one.step for one in readings[-3:]) > 1.5 * fastest:
        wrong.append(f"a step takes {now.step:.2f} ms, {fastest:.2f} ms at first")
    return wrong


def seconds_of(command: str, folder: Path) -> float:
    """How long a ``nanguard`` command takes, start of Python and imports included.

    Raises:
        RuntimeError: When it fails.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_nanguard.cli", command, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"nanguard {command} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and say what was read; gives 1 where something grew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="updates (1,000,000)")
    parser.add_argument("--every", type=int, default=1000, help="updates between two faults (1000)")
    parser.add_argument("--bare", action="store_true", help="without the guard and without faults, for comparison")
    parser.add_argument("--output", type=Path, help="where figures go, as JSON")
    given = parser.parse_args(arguments)
    if given.steps < 10:
        parser.error("--steps needs at least 10: one for each tenth that is read")
    torch.set_num_threads(1)
    commands: dict[str, float] = {}
    print(
        "| updates | memory, MB | tensors | step, ms | files, kB | interventions |\n|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name) / "run"
        readings = long_run(given.steps, 0 if given.bare else given.every, folder, guarded=not given.bare)
        if not given.bare:
            commands = {command: seconds_of(command, folder) for command in ("explain", "report")}
    print("; ".join(f"nanguard {command}: {took:.1f} s" for command, took in commands.items()))
    wrong = grown(readings)
    print("\n".join(wrong))
    if given.output is not None:
        figures = {"steps": given.steps, "every": given.every, "seconds": commands, "grown": wrong}
        given.output.write_text(json.dumps({**figures, "readings": [asdict(one) for one in readings]}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
