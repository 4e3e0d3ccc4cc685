"""Looks from outside a run, for the ``nanguard`` command: a model before it is trained, and an incident replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_nanguard.diagnosis.batch import look_at, samples
from lightning_nanguard.diagnosis.bundle import Bundle, put_into, state_of
from lightning_nanguard.diagnosis.clues import Case, Clues, Layer, Model
from lightning_nanguard.diagnosis.gradients import check_gradients
from lightning_nanguard.diagnosis.preflight import Preflight, look_through
from lightning_nanguard.diagnosis.replay import replay
from lightning_nanguard.diagnosis.rules import diagnose, findings
from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.trainer.private.first_batch import at_first_batch, one_batch
from lightning_nanguard.trainer.private.lightning_cli import from_config
from lightning_nanguard.trainer.private.loaders import readable_loader
from lightning_nanguard.trainer.private.training_step import clip_as_configured, forward_backward, loss_with_graph
from lightning_nanguard.trainer.private.untraced import untraced
from lightning_nanguard.types import Finding

# Samples that are learned by heart, and updates in which a model has to.
_FEW = 8


_UPDATES = 200


# The loss falls to this share of the first one where a batch is learned by heart, and stays above that one where not.
_LEARNED, _STUCK = 0.2, 0.8


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        findings: The surest first.
        notes: What else was measured, a sentence each.
    """

    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Replayed:
    """What came of an incident that was run again.

    Attributes:
        losses: The loss of every micro-batch.
        gradient_finite: Whether the gradient was finite; ``None`` without a backward pass.
        finding: The cause found now, ``None`` where none was.
        layers: What the batch looked like layer by layer, in the order in which they ran.
    """

    losses: Sequence[float] = ()
    gradient_finite: bool | None = None
    finding: Finding | None = None
    layers: Sequence[Layer] = ()

    @property
    def bad(self) -> bool:
        """Whether a loss or the gradient is not finite."""
        return self.gradient_finite is False or not all(map(math.isfinite, self.losses))


def check(
    config: Path, model: Any = None, data: Any = None, *, gradients: bool = False, overfit: bool = False
) -> Report:
    """Look at the data and the untrained model of a LightningCLI configuration; nothing is trained or written.

    Args:
        config: The YAML file.
        model: Class of the module, where the file names none.
        data: Class of the data module, where the file names none.
        gradients: Compare gradients with finite differences too.
        overfit: Try whether a few samples can be learned by heart too.
    """
    trainer, module, datamodule = from_config(config, model, data)
    found: list[Report] = []

    def look(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        found.append(look_over(trainer, module, batch, gradients=gradients, overfit=overfit))

    at_first_batch(trainer, module, look, **({} if datamodule is None else {"datamodule": datamodule}))
    return found[0] if found else Report(notes=("there was no batch to look at",))


def look_over(trainer: Any, module: Any, batch: Any, *, gradients: bool = False, overfit: bool = False) -> Report:
    """Look at a module at its first batch; see :func:`check`."""
    automatic = bool(module.automatic_optimization)
    step = partial(loss_with_graph, trainer, batch_idx=0)
    around = partial(untraced, trainer, module)
    preflight = Preflight(module, step, around)
    found = preflight.look(batch, readable_loader(trainer, module), run=automatic)
    notes: list[str] = []
    if not automatic:
        notes.append("manual optimization: only the data was looked at")
    elif gradients or overfit:
        few = first_rows(batch, _FEW)
        if gradients:
            more, note = _check_gradients(module, few, partial(step, full_precision=True), around)
            found, notes = (*found, *more), [*notes, note]
        if overfit:
            notes.append(_overfit(trainer, module, few))
    return Report(tuple(sorted(found, key=lambda one: -one.confidence)), notes)


def _check_gradients(
    module: nn.Module, batch: Any, step: Callable[[Any], Tensor | None], around: Callable[[], Any]
) -> tuple[Sequence[Finding], str]:
    try:
        checks = check_gradients(module, batch, step, around)
    except Exception as error:
        return (), f"gradients: could not be checked in float64: {type(error).__name__}: {error}"
    wrong = [one for one in findings(Case(model=Model(updates=1, checks=checks))) if one.cause == "wrong_gradient"]
    custom = sum(one.custom for one in checks)
    largest = max((one.error for one in checks), default=0.0)
    return wrong, (
        f"gradients: of {len(checks) - custom} parameters and {custom} custom functions the one that differs most from "
        f"finite differences does so by {largest:.2g} of its size"
    )


def _overfit(trainer: Any, module: nn.Module, batch: Any) -> str:
    before = {name: tensor.clone() for name, tensor in state_of(module).items()}
    own = trainer.optimizers[0]
    rate = own.param_groups[0]["lr"]
    tries: list[tuple[str, Optimizer]] = [(f"{type(own).__name__} at {float(rate):.3g}, as configured", own)]
    tries += [(f"Adam at {lr:g}", Adam([p for p in module.parameters() if p.requires_grad], lr)) for lr in (1e-3, 1e-2)]
    said = []
    for name, optimizer in tries:
        put_into(module, before)
        losses = _train(trainer, optimizer, batch)
        if len(losses) < 2:
            return "overfit: there is no loss to follow"
        first, last = losses[0], losses[-1]
        said.append(f"{first:.4g} → {last:.4g} in {len(losses) - 1} updates ({name})")
        if last < _LEARNED * first:
            verdict = "learned by heart"
            if len(said) > 1:
                verdict = "the model can learn them, with another optimizer or rate than configured"
            break
        verdict = "not learned by heart: look at the loss, the labels and what is detached before the optimizer"
        if last < _STUCK * first:
            verdict = "partly learned"
    return f"overfit: {samples(batch) or 0} samples, loss {'; '.join(said)}: {verdict}"


def _train(trainer: Any, optimizer: Optimizer, batch: Any) -> list[float]:
    losses: list[float] = []
    for _ in range(_UPDATES + 1):
        loss = forward_backward(trainer, optimizer, batch, 0)
        if loss is None or not math.isfinite(loss):
            break
        losses.append(loss)
        if loss < 0.01 * losses[0]:
            break
        clip_as_configured(trainer, optimizer)
        optimizer.step()
    return losses


def first_rows(batch: Any, count: int) -> Any:
    """The first samples of a batch; what does not have its length is left as it is."""
    size = samples(batch)
    return mapped(batch, lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == size else tensor)


@dataclass
class _Seen:
    losses: list[float] = field(default_factory=list)
    clues: Clues | None = None
    layers: Sequence[Layer] = ()


def replay_bundle(bundle: Bundle, module: Any) -> Replayed:
    """Run the batches of an incident again, with its weights and random numbers.

    Args:
        bundle: The incident.
        module: A module built with the same arguments.

    Raises:
        ValueError: When the state does not fit the module, or the batch could not be kept whole.
    """
    if bundle.missing or not bundle.batches:
        lost = ", ".join(bundle.missing) or "all of it"
        raise ValueError(f"The batch could not be kept whole, so that it cannot be run again: {lost}.")
    put_into(module, bundle.state)
    seen = _Seen()

    def look(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        put_into(module, bundle.state)  # a hook may have begun to train something
        quietly = partial(untraced, trainer, module)
        for micro in bundle.batches:
            step = partial(_step, trainer, micro)
            clues = look_at(micro.batch, module)
            clues = replay(clues, micro.batch, module, step, untraced=quietly, loss_scale=bundle.loss_scale)
            seen.losses += [] if clues.loss is None else [clues.loss]
            if seen.clues is None or clues.origin is not None or clues.gradient_finite is False:
                seen.clues = clues
                model = look_through(module, micro.batch, step, quietly)
                seen.layers = () if model is None else model.layers

    one_batch(module, bundle.batches[-1].batch, look, precision=bundle.precision)
    clues = seen.clues or Clues()
    finding = diagnose(Case(bundle.fault, replace(bundle.evidence, undo=False), clues))
    return Replayed(seen.losses, clues.gradient_finite, finding, seen.layers)


def _step(trainer: Any, micro: MicroBatch) -> Tensor | None:
    if micro.random:
        torch.set_rng_state(micro.random[0])
    return loss_with_graph(trainer, micro.batch, micro.index)
