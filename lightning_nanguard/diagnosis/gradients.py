"""The gradient of a model against finite differences, in double precision, along random directions."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function

from lightning_nanguard.diagnosis.clues import GradientCheck
from lightning_nanguard.diagnosis.replay import graph
from lightning_nanguard.diagnosis.watch import Modules
from lightning_nanguard.measure.batches import mapped

# Parameters that are checked at most; each takes two forward passes.
_MOST = 200
_STEP = 1e-5
# A difference below this is checked no further; a kink between the two points makes one that another step size lacks.
_CLOSE = 0.01

Step = Callable[[Any], Tensor | None]


def check_gradients(
    module: nn.Module, batch: Any, step: Step, untraced: Callable[[], AbstractContextManager[None]]
) -> tuple[GradientCheck, ...]:
    """Compare every parameter's gradient, and that of every custom function, with finite differences.

    Parameters, buffers and the batch's floating tensors are in float64 meanwhile, and come back bit for bit. Every pass
    draws the same random numbers.

    Args:
        module: What is trained.
        batch: A batch; a small one will do.
        step: Runs a batch forward and gives the loss with its graph.
        untraced: What is run within is undone.

    Raises:
        Exception: Where the model cannot run in float64, whatever it raises then.
    """
    with _doubled(module):
        batch = mapped(batch, _double)
        return (*_functions(module, batch, step, untraced), *_parameters(module, batch, step, untraced))


def _parameters(
    module: nn.Module, batch: Any, step: Step, untraced: Callable[[], AbstractContextManager[None]]
) -> Iterator[GradientCheck]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float64}
    with untraced():
        loss = step(batch)
        if loss is None or loss.grad_fn is None:
            return
        made: Sequence[Tensor | None] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    scale = abs(float(loss.detach()))

    def value() -> float:
        with untraced(), torch.no_grad():
            again = step(batch)
        return float("nan") if again is None else float(again.detach())

    dice = torch.Generator().manual_seed(0)
    for (name, p), gradient in list(zip(named.items(), made, strict=True))[:_MOST]:
        known = torch.zeros_like(p) if gradient is None else gradient.to_dense().detach()
        checks = (_along(name, p.data, known, value, dice, _STEP / 10**turn, scale) for turn in range(3))
        yield _best(checks)


def _along(
    name: str,
    values: Tensor,
    gradient: Tensor,
    loss: Callable[[], float],
    dice: torch.Generator,
    size: float,
    scale: float,
) -> GradientCheck:
    """One direction, half of it along the gradient so that there is something to see."""
    random = torch.randn(values.shape, generator=dice, dtype=torch.float64).to(values.device)
    direction = _unit(_unit(random) + _unit(gradient))
    kept = values.clone()
    ends = []
    for sign in (1, -1):
        values.copy_(kept + sign * size * direction)
        ends.append(loss())
    values.copy_(kept)
    numeric = (ends[0] - ends[1]) / (2 * size)
    analytic = float((gradient * direction).sum())
    # What rounding alone may do to a difference of two losses.
    noise = 1e-13 * scale / size
    return GradientCheck(name, _error(analytic, numeric, noise), analytic, numeric)


def _error(analytic: float, numeric: float, noise: float) -> float:
    apart = abs(analytic - numeric)
    largest = max(abs(analytic), abs(numeric))
    return 0.0 if apart <= noise or largest == 0.0 else apart / largest


def _best(checks: Iterator[GradientCheck]) -> GradientCheck:
    best = next(checks)
    for check in checks:
        if best.error < _CLOSE:
            break
        best = min(best, check, key=lambda one: one.error)
    return best


def _unit(tensor: Tensor) -> Tensor:
    norm = tensor.norm()
    return tensor / norm if float(norm) > 0 else tensor


# ------------------------------------------------------------------------------------------------ custom functions


def _functions(
    module: nn.Module, batch: Any, step: Step, untraced: Callable[[], AbstractContextManager[None]]
) -> Iterator[GradientCheck]:
    with untraced(), Modules(module) as modules:
        loss = step(batch)
        nodes = [] if loss is None or loss.grad_fn is None else graph(loss.grad_fn)
        places: dict[type[Function], str] = {}
        for node in nodes:
            if isinstance(node, BackwardCFunction):
                places.setdefault(type(node)._forward_cls, modules.of(node))  # type: ignore[attr-defined]
    for function, path in places.items():
        with _recorded(function) as calls, untraced():
            step(batch)
        if calls:
            yield _function(function, f"{path or 'training_step'} ({_defined(function)})", calls[0])


@contextmanager
def _recorded(function: type[Function]) -> Iterator[list[tuple[Any, ...]]]:
    # At ``forward``: ``apply`` is often kept under another name.
    original = inspect.getattr_static(function, "forward")
    forward = function.forward
    own = "forward" in vars(function)
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if args and isinstance(args[0], BackwardCFunction) else args
        calls.append(tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given))
        return forward(*args, **kwargs)

    function.forward = staticmethod(record)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        if own:
            function.forward = original  # type: ignore[method-assign]
        else:
            del function.forward


def _function(function: type[Function], place: str, args: tuple[Any, ...]) -> GradientCheck:
    which = [index for index, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    inputs = [args[index].double().requires_grad_() for index in which]

    def call(*tensors: Tensor) -> Any:
        given = list(args)
        for index, tensor in zip(which, tensors, strict=True):
            given[index] = tensor
        return function.apply(*given)  # type: ignore[no-untyped-call]

    right = torch.autograd.gradcheck(
        call, inputs, fast_mode=True, raise_exception=False, check_undefined_grad=False, nondet_tol=1e-9, atol=1e-4
    )
    # Either sees what the other may not: gradcheck in its fast mode lets errors pass that are small beside the number
    # of elements, and a direction may miss an error in a few of them.
    worst = _worst(call, inputs, place)
    return worst if right else replace(worst, error=max(worst.error, 0.1))


def _worst(call: Callable[..., Any], inputs: list[Tensor], place: str) -> GradientCheck:
    dice = torch.Generator().manual_seed(0)

    def weighed() -> Tensor:
        made = call(*inputs)
        outputs = [one for one in (made if isinstance(made, tuple) else (made,)) if isinstance(one, Tensor)]
        weights = torch.Generator().manual_seed(1)
        terms = [(o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).sum() for o in outputs if o.requires_grad]
        return torch.stack(terms).sum()

    made: Sequence[Tensor | None] = torch.autograd.grad(weighed(), inputs, allow_unused=True)
    found = []
    for one, gradient in zip(inputs, made, strict=True):
        known = torch.zeros_like(one) if gradient is None else gradient
        tries = (
            _along(place, one.data, known, lambda: float(weighed().detach()), dice, _STEP / 10**turn, 1.0)
            for turn in range(3)
        )
        found.append(_best(tries))
    return replace(max(found, key=lambda check: check.error), custom=True)


def _defined(function: type[Function]) -> str:
    try:
        code = inspect.unwrap(function.backward).__code__
    except AttributeError:
        return function.__name__
    return f"backward of {function.__name__}, {os.path.basename(code.co_filename)}:{code.co_firstlineno}"


# ------------------------------------------------------------------------------------------------ double precision


@contextmanager
def _doubled(module: nn.Module) -> Iterator[None]:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
