"""``python -m benchmarks.diagnose.cost``: what looking for mistakes costs the first updates, and those after them.

The time inside of what looks on is measured within each step of one run, beside the time of the whole step, so that
other load on the machine moves both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from operator import itemgetter
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from benchmarks.overhead.models import CPU
from lightning_nanguard import NaNGuard
from lightning_nanguard.diagnosis.module_calls import ModuleCalls
from lightning_nanguard.thresholds.mistakes import MistakeThresholds
from lightning_nanguard.trainer.diagnostics import Diagnostics
from lightning_nanguard.trainer.first_updates import FirstUpdates

from .running import quiet

UPDATES = MistakeThresholds().updates
_WATCHED = (
    *((FirstUpdates, name) for name in ("__init__", "see_batch", "see_loss", "see_step", "end_batch")),
    (ModuleCalls, "_see"),
    (Diagnostics, "judge_first_updates"),
)


class Clock(pl.Callback):
    """Seconds of each step, from its start to that of the next, and of what looked on in it."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.steps: list[tuple[float, float]] = []
        self._depth = 0
        self._begun = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        now = time.perf_counter()
        if self._begun:
            self.steps.append((now - self._begun, self.inside))
            self.inside = 0.0
        self._begun = now

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is counted."""

        def watched(*arguments: Any, **options: Any) -> Any:
            if self._depth:
                return call(*arguments, **options)
            self._depth, started = 1, time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self._depth = 0
                self.inside += time.perf_counter() - started

        return watched


@dataclass(frozen=True)
class Cost:
    """Seconds of one run.

    Attributes:
        first: What looked on in the first updates.
        after: What looked on in as many updates after them.
        step: The median step. The first one takes longer than others, and would flatter.
    """

    first: float
    after: float
    step: float


def cost(name: str) -> Cost:
    """What one run of a model took."""
    workload, clock = CPU[name], Clock()
    originals = [(owner, part, getattr(owner, part)) for owner, part in _WATCHED]
    for owner, part, call in originals:
        setattr(owner, part, clock.watch(call))
    try:
        with quiet(), TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu", default_root_dir=folder, max_epochs=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=[clock, NaNGuard()],
            )  # fmt: skip
            # Different batches and a batch size, because only batches that a loader draws are compared.
            ready = [workload.batch() for _ in range(2 * UPDATES + 3)]
            trainer.fit(workload.make(), DataLoader(ready, batch_size=1, collate_fn=itemgetter(0)))
    finally:
        for owner, part, call in originals:
            setattr(owner, part, call)
    first, after = clock.steps[: UPDATES + 1], clock.steps[UPDATES + 1 : 2 * UPDATES]
    return Cost(
        sum(inside for _, inside in first), sum(inside for _, inside in after), median(one for one, _ in clock.steps)
    )


def main(argv: list[str] | None = None) -> int:
    """Measure some models, each several times, and compare the lowest times: other load on the machine only adds."""
    parser = argparse.ArgumentParser(prog="benchmarks.diagnose.cost", description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(CPU), default=["mlp", "resnet", "transformer"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        found = [cost(name) for _ in range(arguments.runs)]
        first, after, step = (min(column) for column in zip(*map(astuple, found), strict=True))
        print(
            f"{CPU[name].title:30} step {1e3 * step:8.2f} ms   first {UPDATES} updates {1e6 * first:.0f} µs, "
            f"{first / (UPDATES * step):.2%}   after {1e6 * after:.0f} µs",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
