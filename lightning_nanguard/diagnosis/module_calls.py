"""Records which modules run in a batch, and whose outputs are used without their graph."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from lightning_nanguard.diagnosis.batch import tensor_fields
from lightning_nanguard.diagnosis.operation_trace import storage_key

_Known = tuple[int, tuple[int, ...]]
"""Where a tensor lies, and its shape."""


@dataclass(frozen=True, slots=True)
class _Call:
    path: str
    graph: bool
    drops: bool
    given: tuple[_Known, ...]
    made: tuple[_Known, ...]


@final
class ModuleCalls:
    """Records the calls of a model's modules, from :meth:`begin` to :meth:`end`. It holds no tensor.

    It uses one global hook, because some of torch's modules run other code if they have hooks of their own.

    Args:
        modules: The model's modules, by path.
        most: Largest number of recorded calls.
    """

    def __init__(self, modules: Mapping[str, nn.Module], most: int) -> None:
        self._paths = {id(one): path for path, one in modules.items()}
        self._most = most
        self._calls: list[_Call] = []
        self._handle: RemovableHandle | None = None
        self._ran: set[str] = set()
        self._raw: set[int] = set()

    def begin(self, batch: Any) -> None:
        """Record calls from now on. The tensors of the batch need no graph."""
        self._raw = {storage_key(tensor) for _, tensor in tensor_fields(batch)}
        self._handle = register_module_forward_hook(self._see)

    def end(self) -> None:
        """Stop recording calls."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._ran = {call.path for call in self._calls}

    def _see(self, module: nn.Module, given: Any, made: Any) -> None:
        if torch.compiler.is_compiling():
            return  # the hook would be compiled, too
        path = self._paths.get(id(module))
        if path is None or len(self._calls) >= self._most:
            return
        # Tensors inside a transform of torch.func have no storage. Recording must never end the run.
        with contextlib.suppress(Exception):
            outputs = [one for one in _tensors(made) if one.requires_grad]
            inputs = list(_tensors(given))
            cut = [_known(one) for one in inputs if not one.requires_grad and one.is_floating_point()]
            drops = not outputs and any(one.requires_grad for one in inputs)
            self._calls.append(_Call(path, bool(outputs), drops, tuple(cut), tuple(map(_known, outputs))))

    def ran(self) -> set[str]:
        """Paths of the modules that were run."""
        return self._ran

    def seen_of(self, owner: str) -> str:
        """The module that ran for a parameter's owner.

        Some of torch's modules use the weights of their submodules directly.
        """
        while owner and owner not in self._ran:
            owner = owner.rpartition(".")[0]
        return owner

    def with_graph(self) -> set[str]:
        """Paths of the modules with an output that requires a gradient."""
        return {call.path for call in self._calls if call.graph}

    def cut(self, trained: Collection[str]) -> set[str]:
        """Paths of the modules whose outputs entered a trained module without their graph.

        Args:
            trained: Paths of the modules with a parameter that gets a gradient.
        """
        places: dict[int, int] = {}
        shapes: dict[tuple[int, ...], int] = {}
        last = -1
        for index, call in enumerate(self._calls):
            if call.path in trained:
                for place, shape in call.given:
                    # The same memory, or a tensor of the same shape that is no part of the batch.
                    found = places.get(place, -1 if place in self._raw else shapes.get(shape, -1))
                    last = max(last, found)
            if call.drops:  # the graph ends inside this module
                places.clear()
                shapes.clear()
            for place, shape in call.made:
                places[place] = shapes[shape] = index
        return {call.path for call in self._calls[: last + 1] if call.graph}


def _known(tensor: Tensor) -> _Known:
    return storage_key(tensor), tuple(tensor.shape)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    return (tensor for _, tensor in tensor_fields(value))
