"""Runs the batches of an incident again, outside of its run, for ``nanguard replay``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.batch import batch_clues
from lightning_nanguard.diagnosis.bundle import Bundle
from lightning_nanguard.diagnosis.case import Case, Clues, Layer
from lightning_nanguard.diagnosis.layers import measure_layers
from lightning_nanguard.diagnosis.module_state import put_into
from lightning_nanguard.diagnosis.replay import replay
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.trainer.private.first_batch import one_batch
from lightning_nanguard.trainer.private.training_step import BareStep
from lightning_nanguard.trainer.private.untraced import untraced
from lightning_nanguard.types import Finding


@final
@dataclass(frozen=True)
class ReplayReport:
    """The result of a replay of an incident.

    Attributes:
        losses: The loss of every micro-batch.
        gradient_finite: Whether the gradient was finite; ``None`` without a backward pass.
        finding: The cause found now, ``None`` if none was.
        layers: The measurements of each layer, in the order in which the layers ran.
    """

    losses: Sequence[float] = ()
    gradient_finite: bool | None = None
    finding: Finding | None = None
    layers: Sequence[Layer] = ()

    @property
    def bad(self) -> bool:
        """Whether a loss or the gradient is not finite."""
        return self.gradient_finite is False or not all(map(math.isfinite, self.losses))


@dataclass
class _Seen:
    losses: list[float] = field(default_factory=list)
    clues: Clues | None = None
    layers: Sequence[Layer] = ()


def replay_bundle(bundle: Bundle, module: Any) -> ReplayReport:
    """Run the batches of an incident again, with its weights and random numbers.

    Args:
        bundle: The incident.
        module: A module built with the same arguments.

    Raises:
        ValueError: If the state does not fit the module, or the bundle lacks a part of the batch.
    """
    if bundle.missing or not bundle.batches:
        lost = ", ".join(bundle.missing) or "all of it"
        raise ValueError(f"The incident does not hold the whole batch, so it cannot be run again. Missing: {lost}.")
    put_into(module, bundle.state)
    seen = _Seen()
    one_batch(module, bundle.batches[-1].batch, partial(_on_batch, bundle, seen), precision=bundle.precision)
    clues = seen.clues or Clues()
    finding = RuleSet().diagnose(Case(bundle.fault, replace(bundle.evidence, undo=False), clues))
    return ReplayReport(seen.losses, clues.gradient_finite, finding, seen.layers)


def _on_batch(bundle: Bundle, seen: _Seen, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    put_into(module, bundle.state)  # again, because a hook may have changed the weights
    around = partial(untraced, trainer, module)
    for micro in bundle.batches:
        step = partial(_step, trainer, micro)
        clues = batch_clues(micro.batch, module)
        clues = replay(clues, micro.batch, module, step, untraced=around, loss_scale=bundle.loss_scale)
        seen.losses += [] if clues.loss is None else [clues.loss]
        if seen.clues is None or clues.origin is not None or clues.gradient_finite is False:
            seen.clues = clues
            model = measure_layers(module, micro.batch, step, around)
            seen.layers = () if model is None else model.layers


def _step(trainer: Any, micro: MicroBatch) -> Tensor | None:
    if micro.random:
        torch.set_rng_state(micro.random[0])
    return BareStep(trainer).loss_with_graph(micro.batch, micro.index)
