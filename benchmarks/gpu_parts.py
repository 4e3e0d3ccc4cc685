"""The parts of :mod:`benchmarks.gpu_check`: each gives what it found, and whether that is as it should be (``ok``)."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from benchmarks.overhead.models import GPT, Classifier
from lightning_nanguard import NaNGuard
from lightning_nanguard.act.learning_rate import LearningRate
from lightning_nanguard.act.skip import StepSkipper, skips_on_device
from lightning_nanguard.measure.norms import partial_norms
from lightning_nanguard.state.device import Device, pinned_bytes
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.side_copy import SideCopy
from lightning_nanguard.state.snapshot_room import Place

Found = dict[str, Any]
SHOWN = 300


@dataclass(frozen=True)
class Bench:
    """Where the parts run.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` to test the parts themselves.
    """

    device: str

    @property
    def real(self) -> bool:
        """Whether it is a card."""
        return self.device == "cuda"

    def finish(self) -> None:
        """Wait for all that was launched."""
        if self.real:
            torch.cuda.synchronize()

    def guards_device(self) -> Device:
        """The device as the guard sees it; a fake one on the CPU."""
        if self.real:
            return Device()
        from tests.fake_device import fake_device

        return fake_device("random")[0]

    def fit(self, module: LightningModule, batches: list[Any], *callbacks: Callback, **options: Any) -> None:
        """Train on some batches."""
        trainer = Trainer(
            max_epochs=1, accelerator="gpu" if self.real else "cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=list(callbacks), **options,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader(batches, batch_size=None))


class Net(LightningModule):
    """A small network with batch norm."""

    def __init__(self, make: Callable[..., optim.Optimizer], width: int = 64) -> None:
        super().__init__()
        self.make = make
        self.net = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> optim.Optimizer:
        return self.make(self.parameters(), lr=1e-2)


class Own(optim.AdamW):
    """An optimizer of the user's."""


class Weights(Callback):
    """Remembers the weights after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    def moved(self, index: int) -> bool:
        return not all(map(torch.equal, self.seen[index - 1], self.seen[index]))

    def finite(self, index: int = -1) -> bool:
        return all(bool(torch.isfinite(one).all()) for one in self.seen[index])


def batches(count: int = 40, bad: int | None = None) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(32, 16, generator=draw) for _ in range(count)]
    if bad is not None:
        made[bad][0, 0] = math.nan
    return made


def guard_in(folder: str, **options: Any) -> NaNGuard:
    return NaNGuard(dirpath=folder, **{"snapshot_every_n_steps": 4, **options})


def flags(bench: Bench) -> Found:
    """Which optimizers leave weights and state alone where ``found_inf`` says so, beside which are trusted with it."""
    rows = {}
    for kind in (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad, optim.NAdam, optim.RAdam, optim.RMSprop, Own):
        for fused in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                weight = nn.Parameter(torch.ones(64, device=bench.device, dtype=dtype))
                try:
                    options = {"momentum": 0.9} if kind is optim.SGD else {}
                    made: Any = kind([weight], lr=0.1, **options, **({"fused": True} if fused else {}))
                    weight.grad = torch.ones_like(weight)
                    made.step()
                except (RuntimeError, TypeError, ValueError) as error:
                    rows[f"{kind.__name__} fused={fused} {dtype}"] = f"not made: {type(error).__name__}"
                    continue
                before = [weight.detach().clone(), *(v.clone() for v in made.state[weight].values() if v is not None)]
                weight.grad = torch.full_like(weight, math.nan)
                made.found_inf, made.grad_scale = torch.ones((), device=bench.device), None
                try:
                    made.step()
                    after = [weight.detach(), *(v for v in made.state[weight].values() if v is not None)]
                    kept = all(map(torch.equal, before, after))
                except AssertionError:
                    kept = False  # it refuses the flag
                rows[f"{kind.__name__} fused={fused} {dtype}"] = {"kept": kept, "trusted": skips_on_device(made)}
    wrong = [name for name, row in rows.items() if isinstance(row, dict) and row["trusted"] and not row["kept"]]
    return {"ok": not wrong, "wrong": wrong, "rows": rows}


def torn(bench: Bench) -> Found:
    """Whether copies beside the run are whole where the check says so, while something writes to their sources."""
    device, size = bench.guards_device(), 1 << (24 if bench.real else 8)
    counts = {"whole": 0, "noticed": 0, "missed": 0, "false alarms": 0}
    for seed in range(40):
        sources = [torch.full((size,), float(seed + index), device=bench.device) for index in range(4)]
        expected = [source.clone() for source in sources]
        targets = [device.pinned_like(source) for source in sources]
        copies = SideCopy(device)
        check = copies.send(targets, sources)
        writes = seed % 2 == 1
        if writes:  # on the run's own stream, which does not wait
            sources[seed % 4].data.mul_(0.5)
        copies.settle()
        for source in sources:
            source.zero_()
        said = check.intact()
        true = all(torch.equal(target, one.cpu()) for target, one in zip(targets, expected, strict=True))
        counts["whole"] += said and true
        counts["noticed"] += not said and not true
        counts["missed"] += said and not true
        counts["false alarms"] += not said and not writes
    return {"ok": counts["missed"] == 0 and counts["false alarms"] == 0, **counts}


def waits(bench: Bench) -> Found:
    """How often the host waits for the card in a healthy run with a fused optimizer, beside the same run bare."""
    if not bench.real:
        return {"ok": True, "note": "nothing waits on the CPU"}
    counts = {}
    for name in ("bare", "guard", "guard, snapshots in the host"):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"snapshot_device": "cpu"} if "host" in name else {}
            guards = [] if name == "bare" else [guard_in(folder, **options)]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                module = Net(lambda p, lr: optim.AdamW(p, lr=lr, fused=True))
                trainer = Trainer(
                    max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, callbacks=guards,
                )  # fmt: skip
                trainer.fit(module, DataLoader(batches(200), batch_size=None))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts[name] = sum("synchronizing" in str(one.message) for one in caught)
    # At its start and its end the guard may wait; two hundred steps must not.
    return {"ok": all(count - counts["bare"] < 100 for count in counts.values()), "waits": counts}


def norms(bench: Bench) -> Found:
    """Launches and microseconds of the gradient norms of GPT-2's shape, by dtype."""
    found = {}
    for dtypes in ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)):
        values = [torch.ones(768 if bench.real else 4, device=bench.device, dtype=dtypes[i % len(dtypes)])
                  for i in range(148)]  # fmt: skip
        partial_norms(values)
        bench.finish()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if bench.real else []
        with torch.profiler.profile(activities=activities) as profile:
            partial_norms(values)
            bench.finish()
        launches = sum("LaunchKernel" in event.name for event in profile.events() or [])
        took = []
        for _ in range(50):
            started = time.perf_counter()
            partial_norms(values)
            bench.finish()
            took.append(1e6 * (time.perf_counter() - started))
        found["+".join(map(str, dtypes))] = {"launches": launches, "microseconds": round(median(took), 1)}
    return {"ok": all(row["launches"] <= 20 for row in found.values()), "rows": found}


def tests(bench: Bench) -> Found:
    """The tests in tests/gpu."""
    if not bench.real:
        return {"ok": True, "note": "they are skipped without a card"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return {"ok": done.returncode == 0, "output": done.stdout[-3000:]}


def spike(bench: Bench) -> Found:
    """fp16: a finite gradient that is skipped neither moves the weights nor halves the loss scale."""
    found, ok = {}, True
    for fused in (False, True):
        net = nn.Linear(4, 1, device=bench.device)
        optimizer = optim.AdamW(net.parameters(), fused=fused)
        scaler = torch.amp.GradScaler(bench.device, init_scale=1024.0)
        skipper = StepSkipper(Learner(net, [optimizer], scaler))
        LearningRate([optimizer]).attach(skipper.remove_gradients, skipper.return_gradients)
        scaler.scale(net(torch.ones(2, 4, device=bench.device)).sum()).backward()
        before = net.weight.detach().clone()
        skipper.open()
        skipper.skip(0)
        scaler.step(optimizer)
        scaler.update()
        row = {"kept": torch.equal(before, net.weight), "scale": scaler.get_scale()}
        found[f"fused={fused}"] = row
        ok &= row == {"kept": True, "scale": 1024.0}
    return {"ok": ok, **found}


class Graphed(LightningModule):
    """Forward and backward as one captured graph, which writes to the same gradients each time."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.real = False, real
        self.net = nn.Linear(16, 1)
        self.graph: Any = None

    def forward_and_backward(self) -> None:
        loss = (self.net(self.place) - self.place.sum(1, keepdim=True)).square().mean()
        for parameter, new in zip(
            self.net.parameters(), torch.autograd.grad(loss, [*self.net.parameters()]), strict=True
        ):
            parameter.grad.copy_(new)

    def on_train_start(self) -> None:
        self.place = torch.zeros(32, 16, device=self.device)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if not self.real:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward_and_backward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.forward_and_backward()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.place.copy_(batch)
        self.graph.replay() if self.graph is not None else self.forward_and_backward()
        self.optimizers().step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), 0.05)


def graphs(bench: Bench) -> Found:
    """A captured graph trains on after a bad batch."""
    with tempfile.TemporaryDirectory() as folder:
        guard, seen = guard_in(folder, readback="step"), Weights()
        bench.fit(Graphed(bench.real), batches(bad=20), guard, seen)
        remedies = [record.remedies for record in guard.interventions]
    still = [index for index in range(1, 40) if not seen.moved(index)]
    return {"ok": still == [20] and seen.finite(), "still": still, "remedies": remedies}


def foreign(bench: Bench) -> Found:
    """Optimizers that are not torch's own, or not fused: a bad batch never ends in bad weights."""
    rows, ok = {}, True
    makers: dict[str, Callable[..., optim.Optimizer]] = {
        "subclass, fused": lambda p, lr: Own(p, lr=lr, fused=True),
        "subclass": Own,
        "AdamW": optim.AdamW,
        "AdamW, fused": lambda p, lr: optim.AdamW(p, lr=lr, fused=True),
        "SGD with momentum, fused": lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9, fused=True),
    }
    for name, make in makers.items():
        for readback in ("auto", "deferred"):
            with tempfile.TemporaryDirectory() as folder:
                guard, seen = guard_in(folder, readback=readback), Weights()
                bench.fit(Net(make), batches(bad=20), guard, seen)
                (record,) = guard.interventions
                moved = seen.moved(20)
            honest = moved is ("restore" in record.remedies) or (record.remedies == ("skip",) and not moved)
            rows[f"{name}, {readback}"] = {"remedies": record.remedies, "moved": moved, "finite": seen.finite()}
            ok &= honest and seen.finite()
    return {"ok": ok, "rows": rows}


def pinning(bench: Bench) -> Found:
    """Seconds for a GiB of pinned memory, and whether the allocator takes what is counted."""
    device = bench.guards_device()
    size = (1 << 28) + 1 if bench.real else 1025
    started = time.perf_counter()
    kept = [device.pinned_like(torch.empty(size, dtype=torch.uint8, device=bench.device)) for _ in range(4)]
    took = time.perf_counter() - started
    taken = getattr(torch.cuda, "host_memory_stats", dict)() if bench.real else {}
    allocated = taken.get("allocated_bytes.current", taken.get("allocated_bytes.allocated"))
    counted = sum(pinned_bytes(one.nbytes) for one in kept)
    is_right = allocated is None or counted <= 1.1 * allocated
    return {"ok": is_right, "seconds per GiB": took / (counted / 2**30), "counted": counted, "allocated": allocated}


class Longer(Callback):
    """Leaves little of the card, and takes more of it step by step, as longer sequences do."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.held = bench, []  # type: ignore[var-annotated]
        self.places: list[Place] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not self.bench.real:
            return
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        wanted = free - total // 20 if not self.held else total // 400
        if wanted < free - total // 50:
            self.held.append(torch.empty(max(1, wanted), dtype=torch.uint8, device="cuda"))


def growth(bench: Bench) -> Found:
    """On a card that fills up snapshots make way, and the run goes on to its end, a bad batch included."""
    with tempfile.TemporaryDirectory() as folder:
        guard, longer = guard_in(folder, snapshot_every_n_steps=2), Longer(bench)
        width = 1 << (18 if bench.real else 6)
        bench.fit(Net(lambda p, lr: Own(p, lr=1e-4), width), batches(bad=20), guard, longer)
        records = [record.remedies for record in guard.interventions]
    longer.held.clear()
    return {"ok": records == [("skip",)], "remedies": records}


def overhead(bench: Bench) -> Found:
    """Milliseconds of a step, bare and guarded, in turns: GPT-2 124M in bf16 with fused AdamW, and an MLP."""
    rows = {}
    shapes: dict[str, tuple[Callable[[], LightningModule], Any, dict[str, Any]]] = {
        "MLP": (lambda: Net(lambda p, lr: optim.AdamW(p, lr=lr, fused=True)), torch.randn(32, 16), {}),
        "GPT-2 124M": (
            (lambda: Classifier(GPT(12, 768, 12, 50257, 1024), fused=True)) if bench.real
            else (lambda: Classifier(GPT(2, 8, 2, 64, 16), fused=True)),
            tuple(torch.randint(0, 50257 if bench.real else 64, (4 if bench.real else 2, 1024 if bench.real else 16))
                  for _ in range(2)),
            {"precision": "bf16-mixed"} if bench.real else {},
        ),
    }  # fmt: skip
    for name, (make, batch, options) in shapes.items():
        times: dict[str, list[float]] = {"bare": [], "guard": []}
        for _ in range(3 if bench.real else 1):
            for contender, took in times.items():
                with tempfile.TemporaryDirectory() as folder:
                    guards = [guard_in(folder, snapshot_every_n_steps="auto")] if contender == "guard" else []
                    clock = Clock(bench)
                    bench.fit(make(), [batch] * (120 if bench.real else 12), *guards, clock, **options)
                    took += clock.blocks
        rows[name] = {key: round(1e3 * median(took), 3) for key, took in times.items()}
    return {"ok": True, "milliseconds": rows}


class Clock(Callback):
    """Seconds of a step, over blocks of ten steps each."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.blocks = bench, []  # type: ignore[var-annotated]
        self._began = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 10 == 9:
            self.bench.finish()
            now = time.perf_counter()
            if batch_idx >= 19 or not self.bench.real:
                self.blocks.append((now - self._began) / 10)
            self._began = now


PARTS: dict[str, Callable[[Bench], Found]] = {
    part.__name__: part
    for part in (flags, torn, spike, graphs, foreign, waits, norms, growth, pinning, tests, overhead)
}
"""The parts by name, what would do most harm first."""
