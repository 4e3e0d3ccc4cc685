"""Tests whether a model can overfit a few samples."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.diagnosis.module_state import put_into, state_of
from lightning_nanguard.thresholds.check import CHECK, CheckThresholds
from lightning_nanguard.trainer.private.training_step import clip_as_configured, forward_backward


def overfit(trainer: Any, module: nn.Module, batch: Any, thresholds: CheckThresholds = CHECK) -> str:
    """Train on one small batch, with the configured optimizer and then with Adam; return the result in one line.

    Args:
        trainer: The trainer, at its first batch.
        module: Its module; it is left trained.
        batch: The samples.
        thresholds: Number of updates, and when the samples count as learned.
    """
    before = {name: tensor.clone() for name, tensor in state_of(module).items()}
    said = []
    for name, optimizer in _optimizers(trainer, module, thresholds):
        put_into(module, before)
        losses = _train(trainer, optimizer, batch, thresholds)
        if len(losses) < 2:
            return "overfit: training_step returned no loss"
        first, last = losses[0], losses[-1]
        said.append(f"{first:.4g} → {last:.4g} in {len(losses) - 1} updates ({name})")
        if last < thresholds.learned_share * first:
            verdict = "learned by heart"
            if len(said) > 1:
                verdict = "the model can learn them, with another optimizer or rate than configured"
            break
        verdict = "not learned by heart: look at the loss, the labels, and for tensors that are detached"
        if last < thresholds.stuck_share * first:
            verdict = "partly learned"
    return f"overfit: {samples(batch) or 0} samples, loss {'; '.join(said)}: {verdict}"


def _optimizers(trainer: Any, module: nn.Module, thresholds: CheckThresholds) -> list[tuple[str, Optimizer]]:
    own = trainer.optimizers[0]
    rate = float(own.param_groups[0]["lr"])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    others = [(f"Adam at {lr:g}", Adam(trained, lr)) for lr in thresholds.adam_rates]
    return [(f"{type(own).__name__} at {rate:.3g}, as configured", own), *others]


def _train(trainer: Any, optimizer: Optimizer, batch: Any, thresholds: CheckThresholds) -> list[float]:
    losses: list[float] = []
    for _ in range(thresholds.overfit_updates + 1):
        loss = forward_backward(trainer, optimizer, batch, 0)
        if loss is None or not math.isfinite(loss):
            break
        losses.append(loss)
        if loss < thresholds.enough_share * losses[0]:
            break
        clip_as_configured(trainer, optimizer)
        optimizer.step()
    return losses
