"""Exceptions in the step of an optimizer whose update is skipped do not end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.optimizer_step import skipped_steps_raise_nothing
from tests.helpers import Task, TwoOptimizers, batches, differences, fit, mlp, state_of, task, with_bad, words


class NeedsGradients(Optimizer):
    """SGD that expects a gradient of every parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss


class RefusesToClip(Task):
    """Clips in a way that raises where a gradient is not finite."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)


class Raises(Callback):
    """Raises an exception of its own before the seventh step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 6:
            raise ValueError("a limit of the user's")


def refusing() -> Task:
    torch.manual_seed(0)
    return RefusesToClip(mlp())


MODULES: dict[str, Callable[[], Task]] = {
    "needs gradients": lambda: task(optimizer=NeedsGradients),
    "needs gradients, manual": lambda: task("manual", optimizer=NeedsGradients),
    "refuses to clip": refusing,
}


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("name", MODULES)
def test_a_skipped_step_does_not_end_the_run(name: str, readback: Any, tmp_path: Path) -> None:
    """A bad batch is skipped, whatever the optimizer or clipping makes of a step without usable gradients."""
    guard = NaNGuard(readback=readback)
    run = fit(MODULES[name](), with_bad(6), guard, folder=tmp_path)
    assert run.trainer.global_step == 24 * (2 if isinstance(run.module, TwoOptimizers) else 1)
    assert all(bool(p.isfinite().all()) for p in run.module.parameters())
    assert {word for one in words(guard) for word in one} <= {"skip", "restore"}


def test_the_weights_are_those_of_a_run_without_the_batch(tmp_path: Path) -> None:
    """A step that raised half-way leaves nothing behind."""
    skipped = fit(MODULES["needs gradients"](), with_bad(6), NaNGuard(), folder=tmp_path)
    data = with_bad(6)
    without = fit(MODULES["needs gradients"](), [*data[:6], *data[7:]], folder=tmp_path)
    assert differences(dict(skipped.module.named_parameters()), dict(without.module.named_parameters())) == []


def test_other_exceptions_are_raised(tmp_path: Path) -> None:
    """What a callback raises in a skipped step is the user's, and so is what a step raises that is not skipped."""
    with pytest.raises(ValueError, match="a limit of the user's"):
        fit(task(), with_bad(6), NaNGuard(), folder=tmp_path, callbacks=[Raises()])
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        fit(refusing(), with_bad(6), NaNGuard(observe=True), folder=tmp_path)


class FullDiskError(Exception):
    """An exception of the user's own."""


@pytest.mark.parametrize("error", [FullDiskError("no space left"), OSError("no space left")], ids=type)
def test_exceptions_of_a_skipped_step_with_another_cause_are_raised(error: Exception, tmp_path: Path) -> None:
    """The user gets to see what the optimizer raises if neither numbers nor missing gradients can be the cause."""

    class Writes(NeedsGradients):
        steps = 0

        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            if closure is not None:
                closure()
            self.steps += 1
            if self.steps == 7:
                raise error

    with pytest.raises(type(error), match="no space left"):
        fit(task(optimizer=Writes), with_bad(6), NaNGuard(), folder=tmp_path)


def test_nothing_is_left_on_the_trainer(tmp_path: Path) -> None:
    """The function that is returned undoes everything, and a healthy run is the same."""
    bare, run = (fit(task(), batches(), guard, folder=tmp_path) for guard in (None, NaNGuard()))
    assert differences(state_of(run), state_of(bare)) == []
    strategy = run.trainer.strategy
    assert "optimizer_step" not in vars(strategy)
    skipped_steps_raise_nothing(run.trainer, lambda optimizer, error: True)()
    assert "optimizer_step" not in vars(strategy)
