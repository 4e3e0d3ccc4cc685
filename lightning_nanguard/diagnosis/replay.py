"""Running a faulty batch again and looking on."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nanguard.diagnosis.batch import fields_of, target_fields
from lightning_nanguard.diagnosis.clues import Clues, Origin
from lightning_nanguard.diagnosis.watch import LIBRARIES, Modules, Watch, extent, key, non_finite, rows
from lightning_nanguard.measure.tensors import dense_values


def replay(
    clues: Clues,
    batch: Any,
    module: nn.Module,
    step: Callable[[], Tensor | None],
    *,
    untraced: Callable[[], AbstractContextManager[None]] = nullcontext,
    loss_scale: float | None = None,
) -> Clues:
    """Complete what ``look_at`` found with what a further run of the batch shows.

    Args:
        clues: What is known.
        batch: The batch that ``step`` runs.
        module: What is trained.
        step: Runs the batch forward and gives the loss with its graph; twice where something is not finite.
        untraced: What is run within is undone.
        loss_scale: A GradScaler's scale, which the loss is multiplied with before its gradient is taken.
    """
    fields = dict(fields_of(batch))
    size = next((len(t) for t in fields.values() if t.dim()), 0)
    scale = loss_scale or 1.0

    @contextmanager
    def running() -> Iterator[None]:
        with untraced(), kept(module), eager():
            yield

    # Looking on costs several times the pass itself: it is first run alone, and looked at only where it is not finite.
    with running():
        loss = step()
        if loss is None:
            return clues
        value = float(loss.detach())
        clues = replace(clues, replayed=True, loss=value)
        differentiable = math.isfinite(value) and loss.grad_fn is not None and loss.numel() == 1
        try:
            gradients = _gradients(loss * scale, module) if differentiable else {}
        except RuntimeError:
            return clues  # some graphs, such as those of re-entrant checkpointing, give no gradient this way
        norms = {name: _norm(gradient) / scale for name, gradient in gradients.items()}
        del loss
    if not math.isfinite(value):
        labels = {key(t): frozenset({"target"}) for name, t in fields.items() if name in target_fields(batch, fields)}
        labels |= {key(p): frozenset({"weights"}) for p in module.parameters()}
        with running(), Modules(module) as modules:
            with Watch(modules, labels, size) as watch:
                loss = step()
            origin = None if loss is None else watch.origin_of(loss)
        return replace(clues, origin=origin, gradient_finite=False)  # no gradient of it would say more
    if not differentiable:
        return clues
    finite, origin = all(map(math.isfinite, norms.values())), None
    if not finite:
        with running(), Modules(module) as modules, _tracebacks():
            loss = step()
            origin = None if loss is None else _first_bad(loss * scale, module, modules, size)
    return replace(
        clues,
        origin=origin,
        gradient_finite=finite,
        norm=math.sqrt(sum(norm**2 for norm in norms.values())) if norms else None,
        norms=tuple(norms.items()),
    )


def measured(module: nn.Module, step: Callable[[], Tensor | None]) -> tuple[float, float] | None:
    """Loss and gradient norm of one more run; ``None`` where it gives no loss."""
    with kept(module):
        loss = step()
        if loss is None:
            return None
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, math.nan
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
        return value, math.sqrt(sum(_norm(gradient) ** 2 for gradient in gradients if gradient is not None))


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Put back what a ``training_step`` may move by itself: buffers, and parameters that are not trained."""
    # Averages and target networks, that a training_step may move by itself. What is trained it does not touch.
    live = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
    before = [(tensor, tensor.detach().clone()) for tensor in live]
    named = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    try:
        yield
    finally:
        for owner, buffers in named:
            owner._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules as they are written."""
    # A compiled module shows no operations; torch before 2.6 cannot be told to leave its compiled code out.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def _tracebacks() -> Iterator[None]:
    # Every node of the graph then knows the line it comes from; no check, no warning.
    enabled, checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(enabled, check_nan=checks)


def _gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Every gradient there is, by name; ``.grad`` is left alone."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: one for name, one in zip(named, found, strict=True) if one is not None}


def _first_bad(loss: Tensor, module: nn.Module, modules: Modules, size: int) -> Origin | None:
    """The first node that made a non-finite gradient of finite ones."""
    first: list[Origin] = []

    def look(node: Any, made: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
        if first:
            return
        bad = non_finite([one for one in made if one is not None])
        if bad and not non_finite([one for one in given if one is not None]):
            first.append(_node_origin(node, bad[0], modules.of(node), size))

    for node in graph(loss.grad_fn):
        node.register_hook(partial(look, node))
    _gradients(loss, module)
    return first[0] if first else None


def graph(*roots: Any) -> list[Any]:
    """Every node that a backward pass from ``roots`` goes through, but the leaves."""
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen and node.name() != "torch::autograd::AccumulateGrad":
                seen.add(node)
                waiting.append(node)
    return list(seen)


def _node_origin(node: Any, bad: Tensor, module: str, size: int) -> Origin:
    name = re.sub(r"Backward\d*$", "", node.name().split("::")[-1])
    lowest, highest, smallest, _ = extent(_saved(node))
    return Origin(
        operation=re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(),
        module=module,
        line=_line_of(node.metadata.get("traceback_", ())),
        backward=True,
        dtype=str(bad.dtype).removeprefix("torch."),
        samples=rows(bad, size),
        lowest=lowest,
        highest=highest,
        smallest=smallest,
        exponent=extent(getattr(node, "_saved_exponent", None))[0],
    )


def _saved(node: Any) -> Any:
    # What the derivative divides by or takes a power of, under the name autograd keeps it.
    for name in ("_saved_other", "_saved_result", "_saved_self"):
        try:
            value = getattr(node, name, None)
        except RuntimeError:  # freed already
            continue
        if isinstance(value, (Tensor, float, int)):
            return value
    return None


def _line_of(traceback: Any) -> str:
    libraries = [
        os.path.dirname(path) + os.sep for name in LIBRARIES if (path := getattr(sys.modules.get(name), "__file__", ""))
    ]
    for text in reversed(traceback):
        found = re.match(r'\s*File "(.+)", line (\d+)', text)
        if found and not found[1].startswith(tuple(libraries)):
            return f"{os.path.basename(found[1])}:{found[2]}"
    return ""


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(dense_values(gradient), dtype=torch.float64))
