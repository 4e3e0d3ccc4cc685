"""Hooks around the step of an optimizer."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.act.step_hooks import hook_step
from tests.helpers import FaultAt, batches, differences, fit, state_of, task


class Wrapper(Optimizer):
    """Wraps an optimizer without a call of torch's constructor, as published Lookahead code does."""

    def __init__(self, inner: Optimizer, table: Callable[[], Any] | None = None) -> None:
        self.inner = inner
        if table is not None:  # nothing calls the hooks in it
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = table(), table()
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state = defaultdict(dict)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return self.inner.step(closure)


TABLES: dict[str, Callable[[], Any] | None] = {"none": None, "dict": dict, "ordered": OrderedDict}


def made(kind: str) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.ones(1))
    inner = SGD([parameter], lr=0.5)
    return parameter, inner if kind == "torch" else Wrapper(inner, TABLES[kind])


@pytest.mark.parametrize("kind", ["torch", *TABLES])
@pytest.mark.parametrize("replaced", [False, True])
def test_functions_around_a_step(kind: str, replaced: bool) -> None:
    """They get the optimizer and the arguments, and may replace these; afterwards the step is the optimizer's own."""
    parameter, optimizer = made(kind)
    if replaced:  # as a scheduler does
        vars(optimizer)["step"] = optimizer.step
    own, calls = vars(optimizer).get("step"), []

    def before(one: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(("before", one is optimizer, args[0] is optimizer, len(args), sorted(kwargs)))
        parameter.grad = torch.ones(1)
        return args, kwargs

    def after(one: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(("after", float(parameter.detach())))

    undos = hook_step(optimizer, before, after)
    optimizer.step()
    assert calls == [("before", True, True, 1, []), ("after", 0.5)]
    for undo in undos:
        undo()
    parameter.grad = None
    optimizer.step()
    assert len(calls) == 2
    assert vars(optimizer).get("step") is own


def falling(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize("table", TABLES)
def test_a_run_with_a_wrapper(table: str, tmp_path: Path) -> None:
    """A healthy run is the same with the guard, bit for bit, and a bad batch is skipped. A NaN rate is replaced."""

    def wrapped(parameters: list[nn.Parameter]) -> Optimizer:
        return Wrapper(SGD(parameters, lr=0.05), TABLES[table])

    class SpoilsRate(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = math.nan if batch_idx == 8 else 0.05

    runs = [
        fit(task(optimizer=wrapped, scheduler=falling), batches(count=12), guard, folder=tmp_path / str(guard is None))
        for guard in (None, NaNGuard())
    ]
    assert differences(*map(state_of, runs)) == []
    guard = NaNGuard()
    fault = FaultAt("loss", math.nan, [5])
    run = fit(task(optimizer=wrapped), batches(count=12), guard, folder=tmp_path, callbacks=[fault, SpoilsRate()])
    assert [one.remedies for one in guard.interventions] == [("skip",), ("hold rate",)]
    assert all(bool(torch.isfinite(one).all()) for one in run.module.parameters())
