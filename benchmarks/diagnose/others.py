"""What other tools say of the same runs; their rules are written from their descriptions.

* ``anomaly``: ``torch.autograd.detect_anomaly``: the function whose backward first returned NaN.
* ``overflow hooks``: as ``DebugUnderflowOverflow`` of transformers: after every forward of a module its weights, inputs
  and outputs are looked at, and the first module of which one holds NaN or Inf is named.
* ``nan detector``: as ``NanDetector`` of fairseq: once loss or gradient norm is not finite, the batch is run again, and
  the first module whose output, or whose output's gradient, holds NaN or Inf is named.

None of them names a cause, or samples. A place counts as right where the module or the operation that the tool names is
the one where it began; one that names a bad input or a bad weight is given the batch's field or the weight.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .problems import Problem

Updates = Iterator[Callable[[], Tensor]]


def anomaly(problem: Problem) -> str:
    """``"(log)"``: an operation without a module."""
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for update in updates(problem):
                update()
        except (ValueError, ArithmeticError):
            pass  # a check of the user's own
        except RuntimeError as error:
            found = re.search(r"Function '(\w+?)Backward\d*' returned nan", str(error))
            if found:
                return f"({re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', found[1]).lower()})"
    return ""


def overflow_hooks(problem: Problem) -> str:
    """The first module with something that is not finite."""
    said: list[str] = []

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if said:
            return
        weight = next((n for n, p in module.named_parameters(recurse=False) if _bad(p)), None)
        if weight is not None:
            said.append(f"parameter {name}.{weight}")
        elif _bad(given):
            said.append(f"input of {name}")
        elif _bad(output):
            said.append(name)

    handles = [m.register_forward_hook(partial(look, name)) for name, m in problem.module.named_modules()]
    try:
        for update in updates(problem):
            update()
            if said:
                break
    except (ValueError, ArithmeticError, RuntimeError):
        pass  # what was seen before the exception counts
    for handle in handles:
        handle.remove()
    return said[0] if said else ""


def nan_detector(problem: Problem) -> str:
    """The first module whose output, or whose output's gradient, is not finite, on a second run of the batch."""
    for update in updates(problem):
        try:
            loss = float(update())
        except (ValueError, ArithmeticError, RuntimeError):
            loss = math.nan  # generously: it looks only where a FloatingPointError was raised
        gradients = [p.grad for p in problem.module.parameters() if p.grad is not None]
        if math.isfinite(loss) and not _bad(gradients):
            continue
        said: list[str] = []

        def forward(name: str, module: nn.Module, given: Any, output: Any, said: list[str] = said) -> None:
            if not said and _bad(output):
                said.append(name)

        def backward(name: str, module: nn.Module, given: Any, output: Any, said: list[str] = said) -> None:
            if not said and _bad(output):
                said.append(name)

        handles = []
        for name, module in problem.module.named_modules():
            handles.append(module.register_forward_hook(partial(forward, name)))
            handles.append(module.register_full_backward_hook(partial(backward, name)))
        try:
            update()
        except (ValueError, ArithmeticError, RuntimeError):
            pass  # as before; besides, a backward hook and an operation in place do not go together
        finally:
            for handle in handles:
                handle.remove()
        return said[0] if said else ""
    return ""


OTHERS: dict[str, Callable[[Problem], str]] = {
    "detect_anomaly": anomaly,
    "overflow hooks": overflow_hooks,
    "nan detector": nan_detector,
}


def place_right(problem: Problem, said: str) -> bool:
    """Whether what a tool said is where it began, as far as it says."""
    if not said:
        return False
    place = problem.place.replace("\\", "")
    if place.startswith("field"):
        return said.startswith("input of") and "0" in place + "input"
    if place.startswith(("parameter", "buffer")):
        return said.startswith("parameter") and re.search(problem.place, said) is not None
    module, _, operation = place.partition(" (")
    if said.startswith("("):
        return bool(operation) and said[1:-1] in re.split(r"\W+", operation)
    return said == module


def updates(problem: Problem) -> Updates:
    """The problem's updates in a plain loop: each call runs forward and backward, and the loop then steps."""
    module, made = problem.module, problem.module.configure_optimizers()
    optimizer, schedulers = (made[0][0], made[1]) if isinstance(made, tuple) else (made, [])
    half = "plugins" in problem.options
    for step in range(problem.steps):
        if problem.disturb is not None:
            problem.disturb(step, module.net, optimizer)
        batch = problem.batches[step % len(problem.batches)]
        x, y = (batch["input"], batch["label"]) if isinstance(batch, Mapping) else batch

        def update(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16) if half else nullcontext():
                loss = module.loss_of(module.net, x, y)
            (loss * 1024 if half else loss).backward()
            for parameter in module.parameters() if half else ():
                if parameter.grad is not None:
                    parameter.grad.div_(1024)
            return loss.detach()

        yield update
        optimizer.step()
        for one in schedulers:
            one["scheduler"].step()


def _bad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, (list, tuple)):
        return any(map(_bad, value))
    return False
