"""Runs a faulty batch again, and traces the operations if the loss or its gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_nanguard.diagnosis.batch import samples, target_fields, tensor_fields
from lightning_nanguard.diagnosis.case import Clues, Origin
from lightning_nanguard.diagnosis.gradient_trace import gradients_by_name, origin_of_bad_gradient
from lightning_nanguard.diagnosis.isolation import Untraced, isolated, without_anomaly_checks
from lightning_nanguard.diagnosis.operation_trace import OperationTrace, RunningModules, storage_key
from lightning_nanguard.measure.norms import double_norm
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.thresholds.fixed import HALF_SCALE

Step = Callable[[], Tensor | None]
"""Runs a batch forward and gives the loss with its graph, ``None`` if there is none."""


def replay(
    clues: Clues,
    batch: Any,
    module: nn.Module,
    step: Step,
    *,
    untraced: Untraced = nullcontext,
    loss_scale: float | None = None,
) -> Clues:
    """Run a batch again, and add the results to its clues.

    Args:
        clues: The clues so far.
        batch: The batch that ``step`` runs.
        module: The trained module.
        step: Runs the batch forward and returns the loss with its graph. It is called twice if a value is not finite.
        untraced: A context that undoes what a run changes.
        loss_scale: Scale of the GradScaler. The loss is multiplied by it before the backward pass.
    """
    scale = loss_scale or 1.0
    # Tracing costs several times the pass itself, so the first run is not traced.
    with isolated(untraced):
        try:
            loss = step()
        except OutOfMemory:
            raise
        except Exception:  # a check found a non-finite value, or an operation failed
            return _closer(clues, batch, module, step, untraced)
        if loss is None:
            return clues
        value = float(loss.detach())
        clues = replace(clues, replayed=True, loss=value)
        differentiable = math.isfinite(value) and loss.grad_fn is not None and loss.numel() == 1
        try:
            gradients = gradients_by_name(loss * scale, module) if differentiable else {}
        except RuntimeError:
            return clues  # some graphs (re-entrant checkpointing) do not support autograd.grad
        norms = {name: double_norm(gradient) / scale for name, gradient in gradients.items()}
        del loss
    if not math.isfinite(value):
        return _closer(clues, batch, module, step, untraced)
    if not differentiable:
        return clues
    finite, origin = all(map(math.isfinite, norms.values())), None
    if not finite:
        with isolated(untraced), RunningModules(module) as modules, without_anomaly_checks(lines=True):
            loss = step()
            size = samples(batch) or 0
            origin = None if loss is None else origin_of_bad_gradient(loss * scale, module, modules, size)
    return replace(
        clues,
        origin=origin,
        gradient_finite=finite,
        norm=math.sqrt(sum(norm**2 for norm in norms.values())) if norms else None,
        norms=tuple(norms.items()),
    )


def _closer(clues: Clues, batch: Any, module: nn.Module, step: Step, untraced: Untraced) -> Clues:
    with isolated(untraced):
        origin = _origin_of_bad_loss(batch, module, step, purposeful=not clues.bad_fields)
    # The gradient of a non-finite loss gives no further clue.
    return replace(clues, replayed=True, origin=origin, gradient_finite=False)


def _origin_of_bad_loss(batch: Any, module: nn.Module, step: Step, *, purposeful: bool) -> Origin | None:
    fields = dict(tensor_fields(batch))
    labels = {storage_key(fields[name]): frozenset({"target"}) for name in target_fields(batch, fields)}
    labels |= {storage_key(p): frozenset({"weights"}) for p in module.parameters()}
    with RunningModules(module) as modules:
        trace = OperationTrace(modules, labels, samples(batch) or 0, purposeful=purposeful)
        try:
            with trace:
                loss = step()
        except OutOfMemory:
            raise
        except Exception as error:
            return trace.origin_of_exception(error)
        return None if loss is None else trace.origin_of(loss)


def runs_finite(module: nn.Module, step: Step) -> bool | None:
    """Whether loss and gradient are finite in one more run; ``None`` if there is no loss."""
    found = loss_and_gradient_norm(module, step)
    return None if found is None else all(map(math.isfinite, found))


def gradient_fits(module: nn.Module, step: Step) -> bool | None:
    """Whether the gradient of a finite loss, which overflows in float16, fits in float32; ``None`` without a loss.

    A gradient is proportional to its loss. So the gradient of a small part of the loss shows it without another format.
    """
    found = loss_and_gradient_norm(module, step, HALF_SCALE)
    return None if found is None or not math.isfinite(found[0]) else math.isfinite(found[1])


def loss_and_gradient_norm(module: nn.Module, step: Step, scale: float = 1.0) -> tuple[float, float] | None:
    """Loss and gradient norm of one more run; ``None`` if there is no loss. The caller undoes what the run changes.

    Args:
        module: The trained module.
        step: Runs a batch forward and returns the loss with its graph.
        scale: The loss is multiplied by it before the backward pass, and the norm is divided by it.
    """
    with without_anomaly_checks():
        loss = step()
        if loss is None:
            return None
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, math.nan
        found = gradients_by_name(loss * scale, module).values()
        return value, math.sqrt(sum(double_norm(one) ** 2 for one in found)) / scale
