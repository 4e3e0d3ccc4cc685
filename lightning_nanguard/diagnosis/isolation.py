"""Runs a batch again and restores the module afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_logger = logging.getLogger("lightning_nanguard")

Untraced = Callable[[], AbstractContextManager[None]]
"""A context that undoes what a run changes: random streams, buffers, parameters that are not trained, metrics, logged
values, attributes."""


@contextmanager
def errors_logged(failed: str) -> Iterator[None]:
    """Log an exception of the block instead of raising it, because a failed diagnosis must not end the run."""
    try:
        yield
    except Exception as error:
        _logger.debug("NaNGuard: %s: %r", failed, error)


@contextmanager
def isolated(untraced: Untraced) -> Iterator[None]:
    """Run the block uncompiled, and undo what it changes."""
    with untraced(), uncompiled(), without_anomaly_checks():
        yield


@contextmanager
def without_anomaly_checks(*, lines: bool = False) -> Iterator[None]:
    """Let a backward pass return NaN where anomaly detection would raise.

    Args:
        lines: Whether to record the source line of every node, as anomaly detection does.
    """
    enabled, checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.autograd.set_detect_anomaly(enabled or lines, check_nan=False)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(enabled, check_nan=checks)


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled."""
    # The operations of a compiled module cannot be traced. Torch before 2.6 cannot skip compiled code.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")
