"""Metrics and running means that repeated updates leave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_nanguard.metrics import NonFiniteRate
from lightning_nanguard.trainer.repeat.measures import RepeatedMeasures


class Measured(nn.Module):
    """Has a metric of the user's and one of the guard's."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.rate = MeanMetric(), NonFiniteRate()


def made() -> tuple[Measured, MeanMetric, RepeatedMeasures]:
    module, running = Measured(), MeanMetric()
    results = SimpleNamespace(_results={"loss": running})
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=results))
    return module, running, RepeatedMeasures(trainer, module)  # type: ignore[arg-type]


def test_what_as_many_batches_have_left_is_taken() -> None:
    """A metric and a running mean that have seen as many batches as in the run take the repeated values."""
    module, running, measures = made()
    for metric in (module.mean, running):
        metric.update(5.0)
    before = measures.now()
    for metric in (module.mean, running):
        metric.reset()
        metric.update(2.0)
    repeated = measures.now()
    measures.put(before)
    assert float(module.mean.compute()) == 5.0
    measures.take(repeated)
    assert (float(module.mean.compute()), float(running.compute())) == (2.0, 2.0)


def test_what_others_have_reset_is_left_alone() -> None:
    """A metric that a validation has updated meanwhile stays as it is; so does what counts skipped batches."""
    module, _, measures = made()
    module.mean.update(1.0)
    repeated = measures.now()
    module.mean.update(3.0)
    module.rate.update(torch.nan)
    measures.take(repeated)
    assert float(module.mean.compute()) == 2.0
    assert float(module.rate.compute()) == 1.0


def test_what_is_remembered_does_not_change() -> None:
    """Metrics that are written in place, and put back twice, are the same both times."""
    module, _, measures = made()
    module.mean.update(1.0)
    before = measures.now()
    for _ in range(2):
        module.mean.update(5.0)
        measures.put(before)
        assert float(module.mean.compute()) == 1.0
