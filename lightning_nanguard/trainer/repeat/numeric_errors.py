"""Separates exceptions of ``training_step`` that NaN or Inf caused from other errors of the user's code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nanguard.measure.batches import mapped, nested_tensors
from lightning_nanguard.measure.finite import batch_finite
from lightning_nanguard.state.device import OutOfMemory

# Messages of checks in the user's code or in packages, of their solvers, and of anomaly mode.
_NUMERIC = re.compile(
    r"\b(nans?|infs?|infinite|infinity|non-?finite|not finite|positive[- ]definite|singular)\b", re.IGNORECASE
)
# Errors of devices and of communication, which are RuntimeErrors, too.
_OF_DEVICES = re.compile(r"\b(cuda|hip|xpu|mps|cublas|cudnn|nccl|gloo|device-side|out of memory)\b", re.IGNORECASE)
_WITHOUT_GRADIENTS = frozenset(
    {TypeError, AttributeError, AssertionError, ValueError, IndexError, KeyError, ZeroDivisionError, RuntimeError}
)
# Some packages replace a loss that is not finite by a constant, which has no graph.
_NO_GRAPH = "element 0 of tensors does not require grad"


def is_numeric(error: BaseException) -> bool:
    """Whether NaN or Inf can be the cause of an exception, by its type and message.

    Checks of values raise ValueError, ArithmeticError or AssertionError, and solvers LinAlgError. ``detect_anomaly``
    raises a RuntimeError. Checks and solvers in the user's code or in packages raise this, a type of their own that is
    derived from it, or a plain Exception, with a message that names NaN, Inf or a matrix that cannot be solved. Errors
    of memory, devices and communication do not match.
    """
    unsolved = torch.linalg.LinAlgError  # type: ignore[attr-defined]
    if isinstance(error, (ArithmeticError, AssertionError, unsolved, np.linalg.LinAlgError)):
        return True
    if isinstance(error, ValueError):
        return not isinstance(error, UnicodeError)
    derived = isinstance(error, RuntimeError) and not isinstance(error, (OutOfMemory, NotImplementedError))
    message = str(error)
    if not (derived or type(error) is Exception) or _OF_DEVICES.search(message):
        return False
    return message.startswith(_NO_GRAPH) or _NUMERIC.search(message) is not None


def may_be_numeric(error: BaseException, batch: Any) -> bool:
    """Whether the numbers of a batch may be the cause of an exception.

    If the batch holds NaN or Inf, it may be any exception but those of memory, files, imports, devices and
    communication: NaN as an index is out of range, and own checks raise exceptions of their own.

    Args:
        error: The exception.
        batch: The batch that was run.
    """
    if is_numeric(error):
        return True
    if not isinstance(error, Exception) or isinstance(error, (OSError, MemoryError, ImportError, OutOfMemory)):
        return False
    return _OF_DEVICES.search(str(error)) is None and _holds_non_finite(batch)


def may_lack_gradients(error: BaseException) -> bool:
    """Whether missing gradients in an optimizer can be the cause of an exception.

    Code that gets ``None`` or an empty list raises these types. Exceptions of the user's own types and of the system (a
    full disk) have another cause.
    """
    return type(error) in _WITHOUT_GRADIENTS


def with_values_of(batch: Any, healthy: Any) -> Any:
    """The batch with the floating numbers of a healthy one, row by row; ``None`` if their structures differ.

    Whole numbers, such as classes and indices, do not change.
    """
    mine, others = list(nested_tensors(batch)), list(nested_tensors(healthy))
    if len(mine) != len(others) or not any(map(torch.is_floating_point, mine)):
        return None
    if not all(_comparable(*pair) for pair in zip(mine, others, strict=True)):
        return None
    source = iter(others)
    made: Callable[[Tensor], Tensor] = lambda tensor: _filled(tensor, next(source))  # noqa: E731
    return mapped(batch, made)


def finite_in(batch: Any) -> Any:
    """The batch with zeros in place of numbers that are not finite; ``None`` if all of them are finite."""
    if not _holds_non_finite(batch):
        return None
    return mapped(batch, lambda one: one.nan_to_num(0.0, 0.0, 0.0) if one.is_floating_point() else one)


def _holds_non_finite(batch: Any) -> bool:
    try:
        return batch_finite(batch) is False
    except Exception:  # a kind of tensor that cannot be checked must not hide the user's exception
        return False


def _comparable(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape[1:] == other.shape[1:] and one.dim() == other.dim()


def _filled(tensor: Tensor, healthy: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not tensor.dim():
        return healthy
    if not len(healthy):
        return tensor
    return healthy[torch.arange(len(tensor), device=tensor.device) % len(healthy)]
