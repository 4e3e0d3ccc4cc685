"""What a run of a micro-batch gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.types import Fault

_DEFAULTS = RepeatedStepsThresholds()


class BadLossError(Exception):
    """Ends the run of a micro-batch before its backward pass, which would make the gradients of its window bad."""

    def __init__(self, fault: Fault, result: Any) -> None:
        super().__init__(fault.message)
        self.fault, self.result = fault, result


@dataclass(slots=True)
class Outcome:
    """What a run of a micro-batch gave.

    Attributes:
        result: The result for Lightning; ``None`` after an exception.
        fault: What is wrong with it; ``None`` if nothing is.
        error: The exception it ended in.
        early: Whether it ended before its backward pass, and so before any gradient and any hook of it.
        caught: The exception in whose place a loss of NaN stands, so that other ranks do not wait for this one.
    """

    result: Any = None
    fault: Fault | None = None
    error: Exception | None = None
    early: bool = False
    caught: Exception | None = None

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.fault is None and self.error is None


def given(outcome: Outcome) -> Any:
    """The result for Lightning; raises the exception there was."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def fault_of(outcome: Outcome, thresholds: RepeatedStepsThresholds = _DEFAULTS) -> Fault:
    """What is wrong with it, an exception as a loss that is not finite.

    Args:
        outcome: What a run gave.
        thresholds: How much of an exception's text is told.
    """
    if outcome.fault is not None:
        return outcome.fault
    text = " ".join(f"training_step raised {type(outcome.error).__name__}: {outcome.error}".split())
    return Fault("non_finite_loss", "batch", "loss", None, text[: thresholds.message])


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
