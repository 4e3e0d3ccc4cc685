"""Compares the gradients of a model with finite differences, in double precision, along random directions."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function

from lightning_nanguard.diagnosis.case import GradientCheck
from lightning_nanguard.diagnosis.gradient_trace import autograd_nodes
from lightning_nanguard.diagnosis.isolation import Untraced
from lightning_nanguard.diagnosis.module_state import trained_parameters
from lightning_nanguard.diagnosis.operation_trace import RunningModules
from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.thresholds.check import GRADIENTS

Step = Callable[[Any], Tensor | None]


def check_gradients(
    module: nn.Module,
    batch: Any,
    step: Step,
    untraced: Untraced,
) -> tuple[GradientCheck, ...]:
    """Compare every parameter's gradient, and that of every custom function, with finite differences.

    During the check parameters, buffers and the batch's floating tensors are float64. They are restored bit for bit.
    Every pass draws the same random numbers.

    Args:
        module: The trained module.
        batch: A batch; a small one is enough.
        step: Runs a batch forward and returns the loss with its graph.
        untraced: A context that undoes what a run changes.

    Raises:
        Exception: The model's own exception if it cannot run in float64.
    """
    with _in_float64(module):
        batch = mapped(batch, _to_float64)
        custom = _check_functions(module, batch, step, untraced)
        return (*custom, *_check_parameters(module, batch, step, untraced))


def _check_parameters(module: nn.Module, batch: Any, step: Step, untraced: Untraced) -> Iterator[GradientCheck]:
    named = {name: p for name, p in trained_parameters(module).items() if p.dtype == torch.float64}
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

    compare = _DifferenceCheck(value, scale)
    for (name, p), gradient in list(zip(named.items(), made, strict=True))[: GRADIENTS.max_parameters]:
        known = torch.zeros_like(p) if gradient is None else gradient.to_dense().detach()
        yield compare(name, p.data, known)


@final
class _DifferenceCheck:
    """Compares gradients with finite differences of a loss, along random directions from its own generator."""

    def __init__(self, loss: Callable[[], float], loss_size: float) -> None:
        self._loss = loss
        self._loss_size = loss_size
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, name: str, values: Tensor, gradient: Tensor) -> GradientCheck:
        """The comparison along the direction that agrees least, with the step size that agrees best."""
        along = (self._best(name, values, gradient) for _ in range(GRADIENTS.directions))
        return max(along, key=lambda one: one.error)

    def _best(self, name: str, values: Tensor, gradient: Tensor) -> GradientCheck:
        sizes = (GRADIENTS.difference / 10**turn for turn in range(GRADIENTS.differences))
        checks = (self._along(name, values, gradient, size) for size in sizes)
        best = next(checks)
        for check in checks:
            if best.error < GRADIENTS.close:
                break
            best = min(best, check, key=lambda one: one.error)
        return best

    def _along(self, name: str, values: Tensor, gradient: Tensor, size: float) -> GradientCheck:
        # Half of the direction is the gradient itself, so that the loss changes measurably.
        random = torch.randn(
            values.shape, generator=self._generator, dtype=torch.float64, device=self._generator.device
        ).to(values.device)
        direction = _unit(_unit(random) + _unit(gradient))
        kept = values.clone()
        ends = []
        for sign in (1, -1):
            values.copy_(kept + sign * size * direction)
            ends.append(self._loss())
        values.copy_(kept)
        numeric = (ends[0] - ends[1]) / (2 * size)
        analytic = float((gradient * direction).sum())
        return GradientCheck(name, self._error(analytic, numeric, size), analytic, numeric)

    def _error(self, analytic: float, numeric: float, size: float) -> float:
        apart = abs(analytic - numeric)
        largest = max(abs(analytic), abs(numeric))
        # The largest rounding error of a difference of two losses.
        rounding = GRADIENTS.rounding * self._loss_size / size
        return 0.0 if apart <= rounding or largest == 0.0 else apart / largest


def _unit(tensor: Tensor) -> Tensor:
    norm = tensor.norm()
    return tensor / norm if float(norm) > 0 else tensor


# ------------------------------------------------------------------------------------------------ custom functions


def _check_functions(module: nn.Module, batch: Any, step: Step, untraced: Untraced) -> Iterator[GradientCheck]:
    with untraced(), RunningModules(module) as modules:
        loss = step(batch)
        nodes = [] if loss is None or loss.grad_fn is None else autograd_nodes(loss.grad_fn)
        places: dict[type[Function], str] = {}
        for node in nodes:
            if isinstance(node, BackwardCFunction):
                places.setdefault(type(node)._forward_cls, modules.of_node(node))  # type: ignore[attr-defined]
    for function, path in places.items():
        with _recording_calls(function) as calls, untraced():
            step(batch)
        if calls:
            place = f"{path or 'training_step'} ({_backward_line(function)})"
            yield _check_function(function, place, calls[0])


@contextmanager
def _recording_calls(function: type[Function]) -> Iterator[list[tuple[Any, ...]]]:
    # ``forward`` is patched, because users often store ``apply`` under another name.
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


def _check_function(function: type[Function], place: str, args: tuple[Any, ...]) -> GradientCheck:
    which = [index for index, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    inputs = [args[index].double().requires_grad_() for index in which]

    def call(*tensors: Tensor) -> Any:
        given = list(args)
        for index, tensor in zip(which, tensors, strict=True):
            given[index] = tensor
        return function.apply(*given)  # type: ignore[no-untyped-call]

    right = torch.autograd.gradcheck(
        call,
        inputs,
        fast_mode=True,
        raise_exception=False,
        check_undefined_grad=False,
        nondet_tol=GRADIENTS.gradcheck_nondeterminism,
        atol=GRADIENTS.gradcheck_tolerance,
    )
    # Both checks are needed. The fast mode of gradcheck misses errors that are small relative to the number of
    # elements. A random direction may miss an error in a few elements.
    worst = _worst_input(call, inputs, place)
    return worst if right else replace(worst, error=max(worst.error, GRADIENTS.gradcheck_error))


def _worst_input(call: Callable[..., Any], inputs: list[Tensor], place: str) -> GradientCheck:
    def weighted_sum() -> Tensor:
        made = call(*inputs)
        outputs = [one for one in (made if isinstance(made, tuple) else (made,)) if isinstance(one, Tensor)]
        weights = torch.Generator().manual_seed(1)
        terms = [
            (o * torch.randn(o.shape, generator=weights, dtype=o.dtype, device=weights.device)).sum()
            for o in outputs
            if o.requires_grad
        ]
        return torch.stack(terms).sum()

    made: Sequence[Tensor | None] = torch.autograd.grad(weighted_sum(), inputs, allow_unused=True)
    compare = _DifferenceCheck(lambda: float(weighted_sum().detach()), 1.0)
    found = []
    for one, gradient in zip(inputs, made, strict=True):
        known = torch.zeros_like(one) if gradient is None else gradient
        found.append(compare(place, one.data, known))
    return replace(max(found, key=lambda check: check.error), custom=True)


def _backward_line(function: type[Function]) -> str:
    try:
        code = inspect.unwrap(function.backward).__code__
    except AttributeError:
        return function.__name__
    return f"backward of {function.__name__}, {os.path.basename(code.co_filename)}:{code.co_firstlineno}"


# ------------------------------------------------------------------------------------------------ double precision


@contextmanager
def _in_float64(module: nn.Module) -> Iterator[None]:
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


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
