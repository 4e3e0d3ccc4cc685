"""What a run of a micro-batch gave, and what is wrong with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nanguard.trainer.repeat.outcome import Outcome, fault_of, given, nan_loss
from lightning_nanguard.types import Fault


def test_an_exception_is_raised_or_stands_for_a_loss() -> None:
    """Lightning gets the result or the exception; for the guard an exception is a loss that is not finite."""
    assert given(Outcome("result")) == "result"
    with pytest.raises(ValueError, match="bad"):
        given(Outcome(error=ValueError("bad")))
    told = fault_of(Outcome(error=ValueError("bad\n" * 200)))
    assert (told.kind, told.scope, len(told.message)) == ("non_finite_loss", "batch", 200)
    assert told.message.startswith("training_step raised ValueError: bad bad")
    fault = Fault("odd", "batch", "loss")
    assert fault_of(Outcome(fault=fault)) is fault


def test_a_loss_of_nan() -> None:
    """Its gradient is NaN in each parameter that is trained."""
    net = nn.Linear(2, 2)
    net.bias.requires_grad = False
    nan_loss(net).backward()
    assert bool(torch.isnan(net.weight.grad).all())
    assert net.bias.grad is None
