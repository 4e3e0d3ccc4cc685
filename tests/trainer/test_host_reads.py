"""Deferred readback: the host waits for nothing in a healthy step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.state.device import Driver, HostCopy
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.trainer.repeat.accumulation_window import AccumulationWindow
from tests.helpers import (
    data_for,
    fit,
    task,
)


def fused(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01, fused=True)


def plain(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01)


class Reads(TorchFunctionMode):
    """Notes every call that brings a value to the host, but for those on memory that a parcel was sent to.

    On the CPU nothing says where a value lies; on a device each of these would wait for it. Bytes are left out: what
    the guard looks at of them are states of random generators, which torch gives out in host memory on any device.
    """

    names = frozenset(
        {
            "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__", "item", "tolist", "numpy",
            "cpu", "is_nonzero", "nonzero", "equal", "allclose", "unique", "masked_select", "argwhere",
        }
    )  # fmt: skip

    def __init__(self, landed: set[int], seen: list[str]) -> None:
        super().__init__()
        self.landed, self.seen = landed, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in [argument for argument in args[1:] if isinstance(argument, str)]
        on_host = args and (id(args[0]) in self.landed or getattr(args[0], "dtype", None) is torch.uint8)
        if (name in self.names or to_host) and not on_host:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts ``aten::_local_scalar_dense``."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.append("_local_scalar_dense")
        return func(*args, **(kwargs or {}))


HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
# What the guard does within Lightning's closure, around the user's step.
PARTS = (
    (StepCheck, "fault"),
    (StepMemory, "open"),
    (StepMemory, "close"),
    (AccumulationWindow, "add"),
    (AccumulationWindow, "weigh"),
)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Watches the guard's hooks."""
    seen: list[str] = []
    landed: set[int] = set()
    kept: list[HostCopy] = []
    send = HostCopy.__init__

    def sent(self: HostCopy, numbers: Tensor, driver: Driver) -> None:
        send(self, numbers, driver)
        landed.add(id(self._numbers))
        kept.append(self)  # so that no other tensor takes its identity

    monkeypatch.setattr(HostCopy, "__init__", sent)
    for owner, name in (*((NaNGuard, name) for name in HOOKS), *PARTS):
        hook: Callable[..., Any] = getattr(owner, name)

        def under(*args: Any, hook: Callable[..., Any] = hook, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                stack.enter_context(Scalars(seen))
                stack.enter_context(Reads(landed, seen))
                return hook(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.wraps(hook)(under))
    yield seen


@pytest.mark.parametrize("make", [fused, plain], ids=["fused", "plain"])
@pytest.mark.parametrize("model", ["norm", "transformer", "sparse"])
def test_a_healthy_step_reads_nothing(
    model: str, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring, judging, taking snapshots and certifying them: none brings a value to the host but by parcel."""
    if model == "sparse":
        make = functools.partial(optim.SGD, lr=0.01)
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=4, dirpath=tmp_path)
    # It waits for the device once, before the first step.
    monkeypatch.setattr(Certification, "start_again_if_changed", lambda self: None)
    with watched(monkeypatch) as seen:
        fit(task(model, make), data_for(model, 40), guard, folder=tmp_path)
    assert seen == []
    assert len(guard.interventions) == 0


def test_the_watch_sees_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step readback the same watch sees the reads there are."""
    guard = NaNGuard(readback="step", snapshot_every_n_steps=4, dirpath=tmp_path)
    with watched(monkeypatch) as seen:
        fit(task("norm", fused), data_for("norm", 12), guard, folder=tmp_path)
    assert seen.count("__float__") >= 12
    assert "_local_scalar_dense" in seen
