"""What one batch touched, so that a skipped one leaves nothing behind.

Buffers (batch-norm statistics), torchmetrics objects on the module, and whatever else the caller hands in as
``others`` (Lightning's running means) are put back as they were before the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_nanguard.snapshot import writable

Undo = Callable[[], None]

# Buffers up to this many bytes are copied before every batch; a larger one only once it was seen to change.
_SMALL = 1 << 16


@final
class BatchScope:
    """Remembers, before a batch, what the batch may touch.

    Args:
        module: The module trained.
        others: Called when a batch opens; each gives what undoes its own part.
        thorough: Remember large buffers and frozen parameters too (the queue and the teacher of self-supervised
            learning): for a second look at a batch, which is rare and must leave no trace.
    """

    def __init__(self, module: nn.Module, others: Sequence[Callable[[], Undo]] = (), *, thorough: bool = False) -> None:
        self._thorough = thorough
        self._module = module
        self._others = tuple(others)
        self._versions: dict[str, tuple[int, int]] = {}
        self._live: set[str] = set()
        self._saved: dict[str, Tensor] = {}
        self._undo: list[Undo] = []
        self._structure()

    def _structure(self) -> None:
        # The guard's own metrics count what is skipped: they must not forget it.
        self._metrics = [
            module
            for module in self._module.modules()
            if isinstance(module, Metric) and not getattr(type(module), "keep_when_skipped", False)
        ]
        normalised = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self._module.named_modules()
            if isinstance(module, _NormBase)
            for name, _ in module.named_buffers(recurse=False)
        }
        self._live |= normalised

    def open(self) -> None:
        """Remember the state of now."""
        buffers = self._touchable()
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        saved: dict[str, Tensor] = {}
        for name, buffer in buffers.items():
            mark = (id(buffer), buffer._version)
            if self._versions.get(name, mark) != mark:
                self._live.add(name)
            self._versions[name] = mark
            if name not in self._live and buffer.nbytes > _SMALL and not self._thorough:
                continue
            memory = self._saved.get(name)
            if memory is not None and memory.shape == buffer.shape and memory.dtype == buffer.dtype:
                targets.append(memory)
                sources.append(buffer.detach())
                saved[name] = memory
            else:
                saved[name] = buffer.detach().clone()
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
        self._saved = saved
        self._undo = [other() for other in self._others]
        self._undo += [_remember(metric) for metric in self._metrics]

    def _touchable(self) -> dict[str, Tensor]:
        named = dict(self._module.named_buffers())
        if self._thorough:
            named |= {name: p.data for name, p in self._module.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in named.items() if writable(tensor)}

    def before(self) -> dict[str, Tensor]:
        """The buffers as they were before the batch, by name, as far as it may have touched them."""
        return dict(self._saved)

    def undo(self) -> None:
        """Put back what the batch touched; may be called once for each :meth:`open`, or again."""
        buffers = self._touchable()
        with torch.no_grad():
            for name, value in self._saved.items():
                live = buffers.get(name)
                if live is not None and live.shape == value.shape:
                    live.copy_(value)
        for undo in self._undo:
            undo()


def _remember(metric: Metric) -> Undo:
    states = {name: _copy_state(getattr(metric, name)) for name in metric._defaults}
    count = metric._update_count
    computed = metric._computed

    def undo() -> None:
        for name, value in states.items():
            setattr(metric, name, _copy_state(value))
        metric._update_count = count
        metric._computed = computed

    return undo


def _copy_state(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value)
