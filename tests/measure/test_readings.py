"""Loss and gradient norm of one update, read at once or later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard.measure.norms import exact_norm, partial_norms
from lightning_nanguard.measure.readings import PendingReading, sum_of
from lightning_nanguard.measure.tensors import gradients
from lightning_nanguard.state.device import Device


def pending(losses: Sequence[Tensor] = (), **options: Any) -> PendingReading:
    return PendingReading(**{"step": 0, "optimizer_index": 0, "norms": [], **options}, loss=sum_of(losses))


def test_a_gradient_that_overflows_its_own_norm_is_confirmed() -> None:
    """A norm that is not finite is looked into: the gradient may be finite."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.full((2,), 3e38)
    one = pending(losses=[torch.tensor(1.0)], norms=partial_norms(gradients([weight])))
    assert not one.read().finite
    assert not one.read(lambda: None).finite
    reading = one.read(lambda: exact_norm(gradients([weight])))
    assert reading.finite
    assert reading.grad_norm == pytest.approx(3e38 * math.sqrt(2), rel=1e-6)


def test_losses_are_unscaled_and_averaged() -> None:
    """Micro-batch losses become their mean, without the GradScaler's factor."""
    losses = [torch.tensor(8.0), torch.tensor([16.0])]
    reading = pending(step=4, optimizer_index=1, losses=losses, loss_scale=torch.tensor(4.0)).read()
    assert (reading.loss, reading.grad_norm, reading.loss_scale, reading.optimizer_index) == (6.0, None, 4.0, 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_are_unscaled_where_gradients_are_scaled(scaled: bool) -> None:
    """An optimizer that unscales its gradients itself is measured before it has done so."""
    reading = pending(norms=[torch.tensor(8.0)], loss_scale=torch.tensor(4.0), gradients_scaled=scaled).read()
    assert reading.grad_norm == (2.0 if scaled else 8.0)


def test_a_scale_of_zero_or_below() -> None:
    """A norm has no sign; of what was multiplied by zero nothing is known, and the update counts as an overflow."""
    options: dict[str, Any] = {"losses": [torch.tensor(-8.0)], "norms": [torch.tensor(8.0)], "gradients_scaled": True}
    reading = pending(**options, loss_scale=torch.tensor(-4.0)).read()
    assert (reading.loss, reading.grad_norm, reading.finite) == (2.0, 2.0, True)
    reading = pending(**options, loss_scale=torch.tensor(0.0)).read()
    assert (reading.loss, reading.loss_finite, reading.finite) == (None, True, False)


@pytest.mark.parametrize(
    ("loss", "norm", "by_loss", "bad"),
    [
        (1.0, 1.0, True, 0.0),
        (math.inf, 1.0, True, 1.0),
        (math.inf, 1.0, False, 0.0),
        (1.0, math.nan, False, 1.0),
        (math.nan, None, False, 0.0),
    ],
)
def test_the_device_says_whether_an_update_is_bad(loss: float, norm: float | None, by_loss: bool, bad: float) -> None:
    """Loss and norm are judged without a read by the host, the loss only where it counts."""
    norms = [] if norm is None else [torch.tensor(norm)]
    assert float(pending(losses=[torch.tensor(loss)], norms=norms).is_bad(by_loss=by_loss)) == bad


def test_a_reading_that_was_sent_holds_the_numbers_of_then() -> None:
    """Once it is on its way to the host, a loss that is written over does not change it."""
    loss = torch.tensor(2.0)
    one = pending(losses=[loss], norms=[torch.tensor(3.0)])
    one.send(Device().read_later)
    loss.zero_()
    assert one.arrived()
    assert one.read()[:4] == (0, 0, 2.0, 3.0)
