"""The guard, and what else people put into a run to see or stop a NaN."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.callbacks.spike import SpikeDetection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from benchmarks.plain import PlainHost
from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.context import Settings


@final
class Nothing(Callback):
    """What a callback costs that does nothing."""


@final
class CheckEach(Callback):
    """Looks at every gradient by itself, as many training scripts do."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise ValueError(f"the gradient of {name} is not finite")


@final
class ZClip(Callback):
    """ZClip's rule (arXiv 2504.02507): a norm far above its running mean is pulled towards it."""

    def __init__(self, decay: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> None:
        self.decay, self.threshold, self.warmup = decay, threshold, warmup
        self.seen: list[float] = []
        self.mean = self.variance = 0.0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if len(self.seen) < self.warmup:
            self.seen.append(norm)
            self.mean = sum(self.seen) / len(self.seen)
            self.variance = sum((value - self.mean) ** 2 for value in self.seen) / len(self.seen)
            return
        z = (norm - self.mean) / (math.sqrt(self.variance) + 1e-6)
        if z > self.threshold:
            target = self.mean + self.threshold**2 / z * math.sqrt(self.variance)
            torch._foreach_mul_(gradients, target / (norm + 1e-6))
            norm = target
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (norm - self.mean) ** 2


@final
class OverflowHooks(Callback):
    """Looks at the output of every module, and at the gradient that comes back through it."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def switch(self, root: nn.Module, on: bool) -> None:
        """Put the hooks on all modules, or take them away."""
        while self.handles:
            self.handles.pop().remove()
        for name, module in root.named_modules() if on else ():
            if not any(True for _ in module.children()) and not isinstance(module, nn.ParameterList):
                self.handles.append(module.register_forward_hook(partial(self._forward, name)))
                self.handles.append(module.register_full_backward_hook(partial(self._backward, name)))

    def _forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._look(name, output)

    def _backward(self, name: str, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        for gradient in grad_output:
            self._look(name, gradient)

    def _look(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} gives a value that is not finite")


Switch = Callable[[pl.Trainer, list[Callback], bool], None]
"""Turns on or off what a contender has beside its callbacks."""


def _nothing_else(trainer: pl.Trainer, callbacks: list[Callback], on: bool) -> None:
    pass


def _guard_hooks(trainer: pl.Trainer, callbacks: list[Callback], on: bool) -> None:
    for callback in callbacks:
        assert isinstance(callback, NaNGuard)
        fit = callback._fit
        assert fit is not None
        fit.context.rate.detach()
        if on:
            fit.context.rate.attach(fit.guard._parts.skipper.remove_gradients)


def _module_hooks(trainer: pl.Trainer, callbacks: list[Callback], on: bool) -> None:
    for callback in callbacks:
        assert isinstance(callback, OverflowHooks)
        callback.switch(trainer.lightning_module, on)


def _clipping(trainer: pl.Trainer, callbacks: list[Callback], on: bool) -> None:
    trainer.gradient_clip_val = 1.0 if on else None


@dataclass(frozen=True)
class Contender:
    """Something that is measured by turning it on and off.

    Attributes:
        title: For tables.
        callbacks: Makes its callbacks, which the Trainer has while it is on.
        switch: Turns on and off what else it has.
        options: Further arguments of the Trainer, for both.
        anomaly: Whether autograd's anomaly mode is on with it, as ``Trainer(detect_anomaly=True)`` has it.
        beside: What there is when it is off.
        matters: Whether it is measured on every workload, and in all rounds.
        device: Where alone it is measured, elsewhere being the same as another.
    """

    title: str
    callbacks: Callable[[Path], list[Callback]] = lambda folder: []
    switch: Switch = _nothing_else
    options: dict[str, Any] = field(default_factory=dict)
    anomaly: bool = False
    beside: str = "bare Lightning"
    matters: bool = False
    device: str | None = None


LATER = 10_000
"""Updates that a guard has behind it when it is measured: at the start of a run it takes more snapshots than later."""


def in_mid_run(folder: Path, **options: Any) -> NaNGuard:
    """A guard that goes on from update :data:`LATER` of a run that knew no fault."""
    module = nn.Linear(1, 1)
    new = PlainHost().make_guard(module, torch.optim.SGD(module.parameters(), 0.1), Settings())
    guard = NaNGuard(dirpath=folder, **options)
    guard.load_state_dict({"guard": {**new.state_dict(), "step": LATER, "healthy_steps": LATER}})
    return guard


def _guard(folder: Path, **options: Any) -> list[Callback]:
    return [in_mid_run(folder, **options)]


CONTENDERS: dict[str, Contender] = {
    "nothing": Contender("a callback that does nothing", lambda folder: [Nothing()], matters=True),
    "clip": Contender("gradient_clip_val=1.0", switch=_clipping, matters=True),
    "each": Contender("a check per parameter", lambda folder: [CheckEach()], matters=True),
    "early": Contender("EarlyStopping(check_finite)", lambda folder: [EarlyStopping("loss", patience=10**9)]),
    "spike": Contender(
        "SpikeDetection",
        lambda folder: [SpikeDetection(atol=1e9, rtol=None, exclude_batches_path=tempfile.mkdtemp(dir=folder))],
    ),
    "zclip": Contender("ZClip's rule", lambda folder: [ZClip()]),
    "anomaly": Contender("detect_anomaly", anomaly=True),
    "hooks": Contender("overflow hooks on each module", lambda folder: [OverflowHooks()], _module_hooks),
    "guard": Contender("NaNGuard()", _guard, _guard_hooks, matters=True),
    "deferred": Contender(
        'NaNGuard(readback="deferred")', partial(_guard, readback="deferred"), _guard_hooks, matters=True, device="cpu"
    ),
    "step": Contender(
        'NaNGuard(readback="step")', partial(_guard, readback="step"), _guard_hooks, matters=True, device="cuda"
    ),
    "guard+clip": Contender(
        "gradient_clip_val=1.0 and NaNGuard()", _guard, _guard_hooks, {"gradient_clip_val": 1.0},
        beside="gradient_clip_val=1.0",
    ),
}  # fmt: skip
"""By name, in the order of the tables."""
