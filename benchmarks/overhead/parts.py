"""Where the guard's time goes: its own parts timed inside a real run, beside one bare read of the gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard import meter, snapshot_manager
from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.guard.reading_judge import ReadingJudge
from lightning_nanguard.state.batch_undo import BatchUndo
from lightning_nanguard.state.learner import Learner

from .contenders import in_mid_run
from .models import Workload
from .turns import make_on, quiet_trainer

# What is timed, under what name; parts of a part are indented and not added up.
_PARTS: tuple[tuple[str, Any, str], ...] = (
    ("remember what the batch may touch", NaNGuard, "on_train_batch_start"),
    ("  buffers, metrics, running means", BatchUndo, "open"),
    ("take the loss", NaNGuard, "on_before_backward"),
    ("measure and judge", NaNGuard, "on_before_optimizer_step"),
    ("  numbers of the update, and in step readback the wait for them", Meter, "measure_now"),
    ("  numbers of the update, and in step readback the wait for them", Meter, "measure_later"),
    ("    list the gradients", Learner, "gradients"),
    ("    their norms", meter, "partial_norms"),
    ("  detectors and history", ReadingJudge, "judge"),
    ("end of the batch", NaNGuard, "on_train_batch_end"),
    ("  take snapshots", snapshot_manager.SnapshotManager, "capture"),
    ("  look at them before they are certified", snapshot_manager.SnapshotManager, "objection"),
)


@contextmanager
def _timed(owner: Any, name: str, spent: list[float], clock: Callable[[], float]) -> Iterator[None]:
    original: Callable[..., Any] = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)

    @wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(clock() - started)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _Bound:
    """One read of the gradients as they lie, in one call for each: nothing that looks at them can cost less."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def read(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        _wait(flat)
        started = time.perf_counter()
        float(torch.linalg.vector_norm(flat))
        self.seconds.append(time.perf_counter() - started)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def profile(workload: Workload, folder: Path, device: str, steps: int, **guard: Any) -> dict[str, Any]:
    """Microseconds a step by part, over a run of ``steps`` steps.

    Returns:
        ``parts`` (title to mean microseconds a step), ``guard`` (their sum), ``step`` (a whole step's median),
        ``bound`` (one read of the gradients), ``snapshots`` (how many were taken).
    """
    from pytorch_lightning.callbacks import Callback

    # The thread's own time knows no waiting for other processes; what a device does it does not know either.
    clock = time.perf_counter if device == "cuda" else time.thread_time
    skipped = steps // 10
    bound = _Bound()
    starts: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            starts.append(clock())
            if len(starts) == skipped:
                for seconds in spent.values():
                    seconds.clear()  # the start of the run is paid once

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for _ in range(20):
                bound.read(trainer.optimizers[0])

    spent: dict[str, list[float]] = {title: [] for title, _, _ in _PARTS}
    module = make_on(device, workload)
    trainer = quiet_trainer(
        folder, [in_mid_run(folder, **guard), Watch()], device, precision=workload.precision, max_steps=steps
    )
    timers = [_timed(owner, name, spent[title], clock) for title, owner, name in _PARTS]
    for timer in timers:
        timer.__enter__()
    try:
        trainer.fit(module, workload.loader(100))
    finally:
        for timer in reversed(timers):
            timer.__exit__(None, None, None)
    parts = {title: 1e6 * sum(seconds) / (steps - skipped) for title, seconds in spent.items()}
    gaps = [after - before for before, after in pairwise(starts)]
    return {
        "parts": parts,
        "guard": sum(value for title, value in parts.items() if not title.startswith(" ")),
        "step": 1e6 * median(gaps),
        "bound": 1e6 * min(bound.seconds),
        "snapshots": len(spent["  take snapshots"]),
    }
