"""Follows a backward pass node by node, to find where the first non-finite gradient was made."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nanguard.diagnosis.case import Origin
from lightning_nanguard.diagnosis.module_state import trained_parameters
from lightning_nanguard.diagnosis.operation_trace import (
    LIBRARIES,
    RunningModules,
    bad_samples,
    non_finite,
    operand_range,
)


def gradients_by_name(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Every gradient by the name of its parameter. ``.grad`` does not change."""
    named = trained_parameters(module)
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: one for name, one in zip(named, found, strict=True) if one is not None}


def origin_of_bad_gradient(loss: Tensor, module: nn.Module, modules: RunningModules, size: int) -> Origin | None:
    """The first node that computed a non-finite gradient from finite ones.

    Args:
        loss: The loss. For source lines it must be computed inside ``without_anomaly_checks(lines=True)``.
        module: The trained module.
        modules: Maps each node to its module.
        size: Number of samples in the batch.
    """
    first: list[Origin] = []

    def look(node: Any, made: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
        if first:
            return
        bad = non_finite([one for one in made if one is not None])
        if bad and not non_finite([one for one in given if one is not None]):
            first.append(_node_origin(node, bad[0], modules.of_node(node), size))

    hooks = [node.register_hook(partial(look, node)) for node in autograd_nodes(loss.grad_fn)]
    try:
        gradients_by_name(loss, module)
    finally:
        # A hook that refers to its node would form a cycle, which keeps the graph and the module in memory.
        for hook in hooks:
            hook.remove()
    return first[0] if first else None


def autograd_nodes(*roots: Any) -> list[Any]:
    """Every node of a backward pass from ``roots``, except the leaves."""
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
    lowest, highest, smallest, _ = operand_range(_saved_operand(node))
    return Origin(
        operation=re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(),
        module=module,
        line=_user_line(node.metadata.get("traceback_", ())),
        backward=True,
        dtype=str(bad.dtype).removeprefix("torch."),
        samples=bad_samples(bad, size),
        lowest=lowest,
        highest=highest,
        smallest=smallest,
        exponent=operand_range(getattr(node, "_saved_exponent", None))[0],
    )


def _saved_operand(node: Any) -> Any:
    # Autograd's names for the saved tensors that the derivative divides by or takes a power of.
    for name in ("_saved_other", "_saved_result", "_saved_self"):
        try:
            value = getattr(node, name, None)
        except RuntimeError:  # already freed
            continue
        if isinstance(value, (Tensor, float, int)):
            return value
    return None


def _user_line(traceback: Any) -> str:
    libraries = [
        os.path.dirname(path) + os.sep for name in LIBRARIES if (path := getattr(sys.modules.get(name), "__file__", ""))
    ]
    for text in reversed(traceback):
        found = re.match(r'\s*File "(.+)", line (\d+)', text)
        if found and not found[1].startswith(tuple(libraries)):
            return f"{os.path.basename(found[1])}:{found[2]}"
    return ""
