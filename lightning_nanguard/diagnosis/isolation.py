"""Running a batch again so that the module is afterwards as before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_logger = logging.getLogger("lightning_nanguard")

Untraced = Callable[[], AbstractContextManager[None]]
"""A context in which nothing that runs leaves a trace: random streams, metrics, logged values, attributes."""


@contextmanager
def errors_logged(failed: str) -> Iterator[None]:
    """Run what is inside, and only log an exception: not to know something must never cost the run.

    Args:
        failed: What could not be done then, in words.
    """
    try:
        yield
    except Exception as error:
        _logger.debug("NaNGuard: %s: %r", failed, error)


@contextmanager
def isolated(module: nn.Module, untraced: Untraced) -> Iterator[None]:
    """Run what is inside without a trace, on compiled modules as they are written, and put untrained state back.

    Args:
        module: What is trained.
        untraced: What is run within is undone by the caller.
    """
    with untraced(), untrained_kept(module), uncompiled(), without_anomaly_checks():
        yield


@contextmanager
def without_anomaly_checks(*, lines: bool = False) -> Iterator[None]:
    """Let a backward pass give the NaN that anomaly detection would raise about.

    Args:
        lines: Whether every node of the graph is to know the line that it comes from, as under anomaly detection.
    """
    enabled, checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.autograd.set_detect_anomaly(enabled or lines, check_nan=False)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(enabled, check_nan=checks)


@contextmanager
def untrained_kept(module: nn.Module) -> Iterator[None]:
    """Restore what a ``training_step`` may move by itself: buffers, and parameters that are not trained."""
    # Averages and target networks, that a training_step may move by itself. What is trained it does not touch.
    live = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
    before = [(tensor, tensor.detach().clone()) for tensor in live]
    named = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    try:
        yield
    finally:
        for owner, buffers in named:
            owner._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules as they are written."""
    # A compiled module shows no operations; torch before 2.6 cannot be told to leave its compiled code out.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
