"""Which strategies are supported, and what they step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_nanguard.trainer.private.strategies import (
    autocasts_to_half,
    check_strategy,
    collects,
    grad_scaler,
    is_sharded,
    step_only_accumulates,
    what_steps,
)
from tests.helpers import batches, fit, task, trainer_for


def test_one_process() -> None:
    """On one device the trainer's own optimizers step the module's parameters, and every strategy is supported."""
    run = fit(task(), batches(count=1))
    check_strategy(run.trainer, run.module)
    assert what_steps(run.trainer, run.module) == (run.trainer.optimizers, None)
    assert not is_sharded(run.trainer)
    assert not collects(run.trainer)
    assert not step_only_accumulates(run.trainer)


class Holder:
    """Stands for a trainer with a strategy of a given name."""

    precision = "32-true"
    optimizers = ()

    def __init__(self, name: str, world_size: int = 2) -> None:
        self.strategy = type(name, (), {"config": {"zero_optimization": {"stage": 2}}})()
        self.world_size = world_size


@pytest.mark.parametrize("name", ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_by_name(name: str) -> None:
    """Strategies of both packages are told by their names: who shards, and who collects a checkpoint by itself."""
    holder = Holder(name)
    check_strategy(holder, task())
    assert is_sharded(holder) is (name != "DDPStrategy")
    assert collects(holder) is (name == "DeepSpeedStrategy")


def test_an_unknown_strategy_of_several_processes() -> None:
    """A strategy that was never tried with several processes is refused, and works with one."""
    check_strategy(Holder("HivemindStrategy", 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"does not support HivemindStrategy with 2 processes\. Use strategy='ddp'"):
        check_strategy(Holder("HivemindStrategy"), nn.Linear(1, 1))


def test_deepspeed_steps_at_the_boundary_of_a_window() -> None:
    """Before it, DeepSpeed's step only accumulates."""

    class Engine:
        boundary = False

        def is_gradient_accumulation_boundary(self) -> bool:
            return self.boundary

    holder = Holder("DeepSpeedStrategy")
    engine = holder.strategy.model = Engine()
    assert step_only_accumulates(holder)
    engine.boundary = True
    assert not step_only_accumulates(holder)


def test_what_a_precision_brings() -> None:
    """Only 16-mixed has a GradScaler and autocasts to float16."""
    half = trainer_for(precision="16-mixed")
    assert isinstance(grad_scaler(half), torch.amp.GradScaler)
    assert autocasts_to_half(half)
    for precision in ("32-true", "bf16-mixed"):
        trainer = trainer_for(precision=precision)
        assert grad_scaler(trainer) is None
        assert not autocasts_to_half(trainer)
