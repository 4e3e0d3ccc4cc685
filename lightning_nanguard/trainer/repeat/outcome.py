"""The outcome of a run of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nanguard.record.text import shortened
from lightning_nanguard.thresholds.fixed import EXCEPTION_TEXT
from lightning_nanguard.types import Fault


class BadLossError(Exception):
    """Ends the run of a micro-batch before its backward pass, which would make the gradients of its window bad."""

    def __init__(self, fault: Fault, result: Any) -> None:
        super().__init__(fault.message)
        self.fault, self.result = fault, result


@dataclass(slots=True)
class Outcome:
    """The outcome of a run of a micro-batch.

    Attributes:
        result: The result for Lightning; ``None`` after an exception.
        fault: Its fault; ``None`` if there is none.
        error: The exception that ended it.
        early: Whether it ended before its backward pass, so that no gradient was computed and no hook called.
        caught: The exception that was replaced by a loss of NaN, so that other ranks do not wait for this one.
    """

    result: Any = None
    fault: Fault | None = None
    error: Exception | None = None
    early: bool = False
    caught: Exception | None = None

    @property
    def good(self) -> bool:
        """Whether there is neither a fault nor an exception."""
        return self.fault is None and self.error is None


def given(outcome: Outcome) -> Any:
    """Return the result for Lightning, or raise the exception of the run."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def fault_of(outcome: Outcome) -> Fault:
    """The fault of an outcome. An exception counts as a loss that is not finite.

    Args:
        outcome: The outcome of a run.
    """
    if outcome.fault is not None:
        return outcome.fault
    text = shortened(f"training_step raised {type(outcome.error).__name__}: {outcome.error}", EXCEPTION_TEXT)
    return Fault("non_finite_loss", "batch", "loss", None, text)


def nan_loss(module: nn.Module) -> Tensor:
    """A loss of NaN whose gradient is NaN in each trained parameter."""
    return _loss_of(module, float("nan"))


def no_loss(module: nn.Module) -> Tensor:
    """A loss of 0 whose gradient is 0 in each trained parameter."""
    return _loss_of(module, 0.0)


def _loss_of(module: nn.Module, factor: float) -> Tensor:
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        each = [(p * factor).sum().to(trained[0].device, torch.float32) for p in trained]
        return torch.stack(each).sum()
