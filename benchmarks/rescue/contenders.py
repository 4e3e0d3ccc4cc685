"""The guard and its rivals, each by its published rule, all on the same runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor

from .cases import Case
from .running import Trained, train


@dataclass(slots=True)
class Attempt:
    """What a contender made of a case.

    Attributes:
        run: The run it ended with; its times are those of all runs it took.
        interventions: What it did, one entry a time.
        steps_lost: Updates thrown away, ``None`` where it is not known.
        applies: ``False`` where the rule cannot be used on the case, and ``run`` is a bare one.
    """

    run: Trained
    interventions: list[dict[str, Any]] = field(default_factory=list)
    steps_lost: int | None = 0
    applies: bool = True


class Contender(ABC):
    """Something that is put to a case."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def attempt(self, case: Case) -> Attempt:
        """Train the case under this contender's rule."""


@final
class Bare(Contender):
    """Lightning as it is."""

    name, title = "bare", "bare"

    def attempt(self, case: Case) -> Attempt:
        return Attempt(train(case, quits_when_lost=True))


@final
class Clip(Contender):
    """``gradient_clip_val=1.0``; Lightning does not clip under manual optimization."""

    name, title = "clip", "clip 1.0"

    def attempt(self, case: Case) -> Attempt:
        if case.recipe.adversarial:
            return Attempt(train(case, quits_when_lost=True), applies=False)
        return Attempt(train(case, clip_val=1.0, quits_when_lost=True), steps_lost=None)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@final
class _ApplyIfFinite(pl.Callback):
    """A step whose gradient is not finite is left out; more than ``most`` of them in a row, and it is taken."""

    def __init__(self, most: int = 5) -> None:
        self.most, self.in_a_row = most, 0
        self.acts: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        finite = all(bool(torch.isfinite(g).all()) for g in _gradients(optimizer))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite or self.in_a_row > self.most:
            return
        self.acts.append({"global_step": trainer.global_step, "remedies": ["skip"]})
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


@final
class SkipNonFinite(Contender):
    """The rule of optax's ``apply_if_finite``."""

    name, title = "skip", "skip"

    def attempt(self, case: Case) -> Attempt:
        rule = _ApplyIfFinite()
        return Attempt(train(case, [rule], quits_when_lost=True), rule.acts, len(rule.acts))


@final
class StopEarly(Contender):
    """``EarlyStopping(check_finite=True)`` with a patience that never ends."""

    name, title = "early_stopping", "EarlyStop"

    def attempt(self, case: Case) -> Attempt:
        rule = EarlyStopping("loss", patience=10**9, check_finite=True, check_on_train_epoch_end=True)
        run = train(case, [rule], quits_when_lost=True)
        acts = [{"global_step": run.steps, "remedies": ["stop"]}] if rule.stopped_epoch else []
        return Attempt(run, acts, None)


@final
class _ZClip(pl.Callback):
    """ZClip as described in arXiv 2504.02507: norms far above their exponential mean are pulled towards it.

    With z the distance of a gradient's norm from the mean in deviations, one above ``threshold`` is scaled so that its
    norm lies threshold²/z deviations above the mean; mean and variance then take in the scaled norm.
    """

    def __init__(self, decay: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> None:
        self.decay, self.threshold, self.warmup = decay, threshold, warmup
        self.seen: dict[int, list[float]] = {}
        self.moments: dict[int, tuple[float, float]] = {}
        self.acts: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients, key = _gradients(optimizer), id(optimizer)
        if not gradients:
            return
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        if key not in self.moments:
            seen = self.seen.setdefault(key, [])
            seen.append(norm)
            if len(seen) >= self.warmup:
                mean = sum(seen) / len(seen)
                self.moments[key] = mean, sum((v - mean) ** 2 for v in seen) / len(seen)
            return
        mean, variance = self.moments[key]
        deviation = math.sqrt(variance) if variance >= 0 else math.nan
        z = (norm - mean) / (deviation + 1e-6)
        if z > self.threshold:
            target = mean + self.threshold**2 / z * deviation
            for g in gradients:
                g.mul_(target / (norm + 1e-6))
            norm = target
            self.acts.append({"global_step": trainer.global_step, "remedies": ["clip"]})
        mean = self.decay * mean + (1 - self.decay) * norm
        self.moments[key] = mean, self.decay * variance + (1 - self.decay) * _square(norm - mean)


def _square(x: float) -> float:
    return x * x  # x**2 raises where this overflows to inf


@final
class ZClip(Contender):
    """ZClip's rule with the paper's values."""

    name, title = "zclip", "ZClip"

    def attempt(self, case: Case) -> Attempt:
        rule = _ZClip()
        return Attempt(train(case, [rule], quits_when_lost=True), rule.acts)


@final
class _Watch(pl.Callback):
    """Stops a run whose loss is not finite or has exploded, or whose weights are lost."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.bad = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        value = float(loss)
        if self.first is None:
            self.first = abs(value)
        lost = not all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        self.bad = lost or not math.isfinite(value) or abs(value) > 1e3 * max(1.0, self.first)
        if self.bad:
            trainer.should_stop = True


@final
class StartAgain(Contender):
    """What a monitor with retraining does: stop at a symptom, cut the rate to a tenth, start again, four times at most.

    A run that comes to its end with a loss no lower than it began is taken for one that does not converge.
    """

    name, title = "restart", "restart"
    most = 4

    def attempt(self, case: Case) -> Attempt:
        acts: list[dict[str, Any]] = []
        seconds = cpu_seconds = 0.0
        lost = 0
        for again in range(self.most + 1):
            rule = _Watch()
            run = train(case, [rule], rate_factor=0.1**again)
            seconds, cpu_seconds = seconds + run.seconds, cpu_seconds + run.cpu_seconds
            start, end = _mean(run.losses[:5]), _mean(run.losses[-20:])
            if again == self.most or not (rule.bad or run.error or run.poisoned or end >= start):
                break
            acts.append({"global_step": run.steps, "remedies": ["restart", "scale"]})
            lost += run.steps
        run.seconds, run.cpu_seconds = seconds, cpu_seconds
        return Attempt(run, acts, lost)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@final
class Guard(Contender):
    """``NaNGuard(act_on=…)``, no other argument given."""

    def __init__(self, act_on: str) -> None:
        self.name, self.title = act_on, f"NaNGuard {act_on}"  # type: ignore[misc]

    def attempt(self, case: Case) -> Attempt:
        from lightning_nanguard import NaNGuard

        return attempt_with(NaNGuard(act_on=self.name), case)  # type: ignore[arg-type]


@final
class ReadLate(Contender):
    """The guard on evidence, in deferred readback where every number arrives two updates late, the latest it may."""

    name, title = "deferred", 'NaNGuard(readback="deferred")'

    def attempt(self, case: Case) -> Attempt:
        from lightning_nanguard import NaNGuard
        from lightning_nanguard.measure.readings import PendingReading

        with patch.object(PendingReading, "arrived", lambda self: False):
            return attempt_with(NaNGuard(act_on="evidence", readback="deferred"), case)


def attempt_with(guard: Any, case: Case) -> Attempt:
    """What a guard, however configured, makes of a case."""
    run = train(case, [guard])
    records = list(guard.interventions)
    return Attempt(run, [_plain(r) for r in records], sum(_lost(r) for r in records))


def _plain(record: Any) -> dict[str, Any]:
    kept = ("global_step", "fault", "place", "remedies", "lr_before", "lr_after", "snapshot_step", "cause", "message")
    return {key: getattr(record, key, None) for key in kept}


def _lost(record: Any) -> int:
    back_to = getattr(record, "snapshot_step", None)
    if back_to is not None:
        return max(0, int(record.global_step) - int(back_to))
    return int("skip" in record.remedies)


SETTINGS: dict[str, Contender] = {c.name: c for c in (Guard("certain"), Guard("evidence"))}
"""Both ways to use the guard, by the value of ``act_on``."""

RIVALS: dict[str, Contender] = {c.name: c for c in (Clip(), SkipNonFinite(), StopEarly(), ZClip(), StartAgain())}
"""Other ways to live with NaN."""

CONTENDERS: dict[str, Contender] = {"bare": Bare()} | RIVALS | SETTINGS
"""By name, in the order of the tables."""

MODES: dict[str, Contender] = {c.name: c for c in (ReadLate(),)}
"""Other ways to use the guard, measured on request."""
