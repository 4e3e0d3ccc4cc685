"""Running ``training_step`` once more."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard.trainer.private.replay import (
    alone,
    clip_as_configured,
    forward_backward,
    loss_with_graph,
    quiet,
    run_training_step,
    same_randomness,
)
from tests.helpers import batches, differences, random_state
from tests.trainer.private.during import during_fit


def test_loss_and_gradient_of_a_batch() -> None:
    """The loss is that of the step, the gradient that of plain backward, clipped as the trainer would on request."""

    def look(trainer: Any, module: Any) -> None:
        x, y = batch = batches(count=3)[2]
        expected = (module.net(x) - y).square().mean()
        wanted = torch.autograd.grad(expected, list(module.parameters()))
        optimizer = trainer.optimizers[0]
        value = float(expected.detach())
        assert run_training_step(trainer, batch, 0) == value
        graph = loss_with_graph(trainer, batch, 0, full_precision=True)
        assert graph is not None
        assert graph.grad_fn is not None
        assert forward_backward(trainer, optimizer, batch, 0) == value
        assert differences(list(wanted), [parameter.grad for parameter in module.parameters()]) == []
        clip_as_configured(trainer, optimizer)
        norms = [float(parameter.grad.norm()) for parameter in module.parameters()]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(0.01, rel=1e-3)

    during_fit(look, gradient_clip_val=0.01)


def test_random_streams_are_put_back() -> None:
    """What is drawn inside is drawn again outside."""
    before = random_state()
    with same_randomness(torch.device("cpu")):
        torch.rand(3)
        np.random.rand()
        random.random()
    assert differences(before, random_state()) == []


def test_quiet() -> None:
    """What is logged inside is not seen, and nothing is saved."""

    def look(trainer: Any, module: Any) -> None:
        before = dict(trainer.logged_metrics)
        with quiet(trainer):
            trainer._logger_connector._logged_metrics["within"] = 1.0
            trainer.save_checkpoint("nowhere/at/all.ckpt")
        assert differences(before, dict(trainer.logged_metrics)) == []
        assert "save_checkpoint" not in vars(trainer)

    during_fit(look)


def test_alone() -> None:
    """Inside, the module itself is run rather than what wraps it."""

    def look(trainer: Any, module: Any) -> None:
        before, trainer.strategy.model = trainer.strategy.model, torch.nn.Identity()
        wrapper = trainer.strategy.model
        with alone(trainer, quiet(trainer)):
            assert trainer.strategy.model is module
        assert trainer.strategy.model is wrapper
        trainer.strategy.model = before

    during_fit(look)
