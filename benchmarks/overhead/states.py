"""Snapshots, rollback and detection: what they take, beside a checkpoint file of the same state."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.restore import restore
from lightning_nanguard.state.snapshot import capture

from .models import Workload
from .turns import make_on, quiet_trainer

_FAULT_AT = 30


class _Faults(Callback):
    """Makes one gradient non-finite, and measures at the end of the run."""

    def __init__(self, guard: NaNGuard, folder: Path) -> None:
        self.guard, self.folder = guard, folder
        self.found: dict[str, Any] = {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == _FAULT_AT:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).view(-1)[0] = float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if "delay_steps" not in self.found and len(self.guard.interventions):
            self.found["delay_steps"] = trainer.global_step - _FAULT_AT - 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fit = self.guard._fit
        assert fit is not None
        learner, device = fit.context.learner, pl_module.device
        taken = capture(learner, step=0, global_step=0)
        self.found["snapshot_bytes"] = taken.nbytes()
        self.found["capture_ms"] = _best(lambda: capture(learner, step=0, global_step=0, reuse=taken), device)
        self.found["rollback_ms"] = _best(lambda: restore(learner, taken), device)
        path = self.folder / "state.ckpt"
        times = 3 if taken.nbytes() < 1e9 else 1
        self.found["checkpoint_save_ms"] = _best(lambda: trainer.save_checkpoint(path), device, times)

        def load() -> None:
            saved = torch.load(path, weights_only=True, map_location=device)
            pl_module.load_state_dict(saved["state_dict"])
            trainer.optimizers[0].load_state_dict(saved["optimizer_states"][0])

        self.found["checkpoint_load_ms"] = _best(load, device, times)
        self.found["rollback_times_faster"] = self.found["checkpoint_load_ms"] / self.found["rollback_ms"]
        path.unlink()


def _best(work: Any, device: torch.device, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * median(seconds)


def measure_states(workload: Workload, folder: Path, device: str, **guard: Any) -> dict[str, Any]:
    """Milliseconds and bytes of a snapshot, of a rollback and of a checkpoint file; updates until a NaN is found."""
    module = make_on(device, workload)
    callback = NaNGuard(dirpath=folder, **guard)
    faults = _Faults(callback, folder)
    trainer = quiet_trainer(folder, [callback, faults], device, precision=workload.precision, max_steps=_FAULT_AT + 10)
    trainer.fit(module, workload.loader(100))
    return faults.found


def peak_memory(workload: Workload, folder: Path, device: str, steps: int) -> dict[str, float]:
    """Peak device memory in MiB, bare, with the guard and without what its snapshots hold; CUDA only."""
    if device != "cuda":
        return {"process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    found: dict[str, float] = {}
    for name, callbacks in (("bare", []), ("guard", [NaNGuard(dirpath=folder, snapshot_device="cpu")])):
        module = make_on(device, workload)
        torch.cuda.reset_peak_memory_stats()
        trainer = quiet_trainer(folder, list(callbacks), device, precision=workload.precision, max_steps=steps)
        trainer.fit(module, workload.loader(100))
        found[f"{name}_mib"] = torch.cuda.max_memory_allocated() / 2**20
        del trainer, module
    found["extra_share"] = found["guard_mib"] / found["bare_mib"] - 1
    return found
