"""Losses and gradients of the update at hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_nanguard.guard.meter import Meter
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.types import Reading


def meter_of(optimizer: str = "SGD", micro_batches: int = 1, **options: bool) -> tuple[Meter, nn.Linear]:
    net = nn.Linear(2, 1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return Meter(
        Learner(net, [getattr(torch.optim, optimizer)(net.parameters(), lr=0.1)]), lambda: micro_batches, **options
    ), net


def test_read_now_and_later_are_the_same() -> None:
    """The mean of the micro-batch losses and the norm of the gradients are measured either way."""
    meter, _ = meter_of(micro_batches=2)
    measured = []
    for measure in (meter.measure_now, meter.measure_later):
        for loss in (1.0, 2.0):
            meter.see_loss(torch.tensor(loss / 2))  # Lightning divides it
        measured.append(measure(7, 0))
    now, later = measured
    assert isinstance(later, PendingReading)
    assert now == Reading(7, 0, 1.5, pytest.approx(math.sqrt(3)))
    assert isinstance(now, Reading)
    # The host adds partial norms up in float64, the device in float32.
    assert later.read() == now._replace(grad_norm=pytest.approx(now.grad_norm))
    assert meter.gradient_norm(0) == pytest.approx(math.sqrt(3))


def test_nothing_to_measure() -> None:
    """Without a loss and without gradients there is no reading."""
    meter, net = meter_of()
    net.zero_grad()
    assert meter.measure_now(1, 0) is None
    assert meter.measure_later(1, 0) is None
    assert meter.gradient_norm(0) == 0.0


def test_a_bad_gradient_is_named() -> None:
    """The first gradient that is not finite is named by its parameter; one whose squares overflow is not bad."""
    meter, net = meter_of()
    assert net.bias.grad is not None
    net.bias.grad.fill_(3e38)
    reading = meter.measure_now(1, 0)
    assert reading is not None
    assert reading.finite
    assert reading.grad_norm == pytest.approx(3e38)
    assert meter.first_bad_gradient(0) is None
    net.bias.grad.fill_(math.nan)
    assert meter.first_bad_gradient(0) == "gradient of bias"
    reading = meter.measure_now(1, 0)
    assert reading is not None
    assert not reading.finite


@pytest.mark.parametrize(("micro_batches", "many_losses"), [(1, False), (2, False), (1, True)])
def test_losses_that_may_be_several_are_copied(micro_batches: int, many_losses: bool) -> None:
    """A captured graph writes each loss to the same place: several of one update are kept as they were."""
    meter, _ = meter_of(micro_batches=micro_batches, many_losses=many_losses)
    place = torch.tensor(1.0)
    meter.see_loss(place)
    place.fill_(2.0)
    reading = meter.measure_now(1, 0)
    assert reading is not None
    assert reading.loss == (micro_batches if micro_batches > 1 or many_losses else 2.0)


def test_further_closures_of_one_step_are_a_line_search() -> None:
    """LBFGS runs its closure several times in a step: only the first is measured where the weights stay."""
    meter, _ = meter_of("LBFGS")
    meter.see_loss(torch.tensor(1.0))
    seen = []
    for _ in range(2):
        for _ in range(3):
            meter.measure_now(1, 0)
            seen.append(meter.is_line_search(0))
        meter.end_batch()
    assert seen == [False, True, True] * 2
    plain, _ = meter_of()
    plain.measure_now(1, 0)
    plain.measure_now(2, 0)
    assert not plain.is_line_search(0)
