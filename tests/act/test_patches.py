"""Wrapping a method of one object, and taking the wrapper away again."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from itertools import permutations
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.act.patches import hook_step, undo_all, wrap_method, wrapped
from tests.helpers import FaultAt, batches, differences, fit, state_of, task


class Owner:
    def say(self, word: str) -> str:
        return word


def adding(mark: str) -> Callable[..., str]:
    return lambda original, word: f"{mark}{original(word)}"


def test_a_wrapper_is_called_in_the_methods_place() -> None:
    """One object is changed, no other of its class, and undoing it leaves nothing behind, however often."""
    owner = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    assert owner.say("x") == "ax"
    assert owner.say.__name__ == "say"
    assert Owner().say("x") == "x"
    undo()
    undo()
    assert owner.say("x") == "x"
    assert not vars(owner)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_wrappers_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    """Whichever is undone first stops acting at once, and at the end what the user had put there is there again."""
    owner: Any = Owner()
    users = owner.say = lambda word: f"u{word}"
    undos = [wrap_method(owner, "say", adding(mark)) for mark in "abc"]
    left = {0: "a", 1: "b", 2: "c"}
    assert owner.say("x") == "cbaux"
    for index in order:
        undos[index]()
        del left[index]
        assert owner.say("x") == "".join(reversed(left.values())) + "ux"
    assert owner.say is users


@pytest.mark.parametrize("by_wraps", [False, True])
def test_what_somebody_else_has_wrapped_since_stays(by_wraps: bool) -> None:
    """Their wrapper stays on the object, and calls through to the method without ours."""
    owner: Any = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    inner = owner.say

    def theirs(word: str) -> str:
        return f"t{inner(word)}"

    if by_wraps:
        theirs = wraps(inner)(theirs)
    owner.say = theirs
    undo()
    assert owner.say is theirs
    assert owner.say("x") == "tx"


def test_a_wrapper_that_is_gone_already() -> None:
    """Where somebody has put something else there, or taken it away, that stays."""
    owner: Any = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    del owner.say
    undo()
    assert not vars(owner)
    undo = wrap_method(owner, "say", adding("a"))
    owner.say = str.upper
    undo()
    assert owner.say is str.upper


def test_inside_a_block() -> None:
    """The method is wrapped inside, and its own again afterwards, also if the block raises."""
    owner = Owner()
    with wrapped(owner, "say", adding("a")):
        assert owner.say("x") == "ax"
    assert not vars(owner)
    with pytest.raises(TypeError, match="str"), wrapped(owner, "say", adding("a")):
        owner.say("x") + 1  # type: ignore[operator]
    assert not vars(owner)


def test_copies_and_pickles_are_without_wrappers() -> None:
    """Of an object that is wrapped, or that somebody has put an undone wrapper back on, a copy has its own method."""
    owner, acting = Owner(), adding("a")
    undo = wrap_method(owner, "say", acting)
    theirs = owner.say
    for copy in (deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert copy.say("x") == "x"
        assert copy.say.__self__ is copy
    undo()
    owner.say = theirs  # as somebody does who had wrapped it meanwhile
    assert pickle.loads(pickle.dumps(owner)).say("x") == "x"
    alive = ref(acting)
    del acting, undo
    assert alive() is None


def test_undo_all_goes_backwards_once() -> None:
    """The newest is undone first, each once, also when another undo raises in between."""
    done: list[int] = []

    def fails() -> None:
        raise OSError("first time")

    undo = undo_all([lambda: done.append(0), fails, lambda: done.append(2)])
    with pytest.raises(OSError, match="first time"):
        undo()
    undo()
    undo()
    assert done == [2, 0]


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
