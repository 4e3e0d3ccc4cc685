"""Which strategies the guard works under."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_nanguard.trainer.private.strategies import (
    accumulation,
    check_strategy,
    collects,
    is_sharded,
    what_steps,
)
from tests.helpers import batches, fit, task


class FSDPStrategy:
    """Is known by its name."""


class SomeStrategy:
    """A strategy nobody has heard of."""


class DDPStrategy:
    """Averages the weights of the ranks now and then."""

    _model_averaging_period = 4


def test_one_device() -> None:
    """On one device the trainer's own optimizers step what the module holds, at every call."""
    run = fit(task(), batches(count=1))
    optimizers, partitions = what_steps(run.trainer, run.module)
    assert (optimizers, partitions) == (run.trainer.optimizers, None)
    assert not is_sharded(run.trainer)
    assert not collects(run.trainer)
    assert not accumulation(run.trainer)()
    check_strategy(run.trainer, run.module)


@pytest.mark.parametrize(
    ("strategy", "automatic", "message"),
    [
        (SomeStrategy(), True, r"does not support SomeStrategy with 2 processes\. Use strategy='ddp'"),
        (DDPStrategy(), True, r"DDPStrategy\(model_averaging_period=…\).*Leave the averaging out"),
        (FSDPStrategy(), False, r"FSDPStrategy with manual optimization"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(strategy: Any, automatic: bool, message: str) -> None:
    """The error says what to use instead."""
    trainer = SimpleNamespace(strategy=strategy, world_size=2, precision="32-true")
    with pytest.raises(ValueError, match=message):
        check_strategy(trainer, SimpleNamespace(automatic_optimization=automatic))


def test_shards_are_told_by_the_strategy() -> None:
    """FSDP shards whichever package its class is of."""
    assert is_sharded(SimpleNamespace(strategy=FSDPStrategy()))
