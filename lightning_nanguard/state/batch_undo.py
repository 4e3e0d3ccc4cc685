"""Undoes what one batch changed, so that the run continues as if a skipped batch had never been there.

It restores buffers (statistics of batch norm), torchmetrics objects of the module, and what ``others`` of the caller
store (Lightning's running means). Modules that the module only holds in a list or an object count as parts of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from operator import is_
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_nanguard.measure.tensors import is_strided
from lightning_nanguard.state.attributes import reach
from lightning_nanguard.state.snapshot import clone, put, writable
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

_logger = logging.getLogger("lightning_nanguard")

Undo = Callable[[], None]

# Begins the names of modules that torch does not list. No attribute has such a name.
_HIDDEN = "hidden module "


@final
class BatchUndo:
    """Stores, before a batch, what the batch may change, and undoes the changes.

    Args:
        module: The module trained.
        others: Functions called before each batch. Each returns a function that undoes its own part.
        thorough: Whether to store large buffers and frozen parameters too (the queue and the teacher in self-supervised
            learning). This is for batches that are run again, which is rare and must leave no trace.
        thresholds: What is copied.
    """

    def __init__(
        self,
        module: nn.Module,
        others: Sequence[Callable[[], Undo]] = (),
        *,
        thorough: bool = False,
        thresholds: RepeatedStepsThresholds = RepeatedStepsThresholds(),
    ) -> None:
        self._limits = thresholds
        self._thorough = thorough
        self._module = module
        self._others = tuple(others)
        self._opened = 0
        self._owners: list[tuple[str, bool, dict[str, Tensor | None]]] = []
        # The buffer dictionaries of modules that have no buffer so far.
        self._empty: list[dict[str, Tensor | None]] = []
        self._metrics: list[_MetricMemory] = []
        self._hidden_modules: list[nn.Module] = []
        # The plan: the buffers it was made for, their copies by name, and the copies by dtype and device.
        self._planned: list[Tensor | None] | None = None
        # Each buffer, or None, at its place when the plan was made. The module may put another tensor there.
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._saved: dict[str, Tensor] = {}
        self._copies: list[_Copies] = []
        # Copies of sparse, nested and other unusual buffers, each with its version at that time.
        self._odd: list[tuple[Tensor, Any, int]] = []
        # Large buffers that have not changed so far, with their versions; and the names of those that have.
        self._watched: list[tuple[str, Tensor, int]] = []
        self._live: set[str] = set()
        self._undo: list[Undo] = []
        self._also: list[Undo] = []

    def open(self) -> None:
        """Store the state before a batch."""
        if self._opened % self._limits.modules_counted_every == 0 or any(self._empty):
            self._list_modules()
        self._opened += 1
        if self._owners or self._thorough or self._planned:
            self._open_buffers()
        self._undo = [other() for other in self._others]
        self._undo += [metric.open() for metric in self._metrics]
        if self._also:
            self._also = []

    def measures(self) -> Sequence[Undo]:
        """Functions that restore metrics and the caller's part as before this batch, even after later batches."""
        return self._undo

    def also(self, undo: Undo) -> None:
        """Add a function that is called when this batch is undone."""
        self._also.append(undo)

    def _open_buffers(self) -> None:
        buffers = [buffer for _, _, owned in self._owners for buffer in owned.values()]
        changed = self.written()
        if any(buffer._version != version for buffer, _, version in self._odd):
            self._odd = [_odd_copy(buffer) for buffer, _, _ in self._odd]
        if changed or self._thorough or not self._is_planned(buffers):
            self._live.update(changed)
            self._plan(buffers)
        if self._copies:
            try:
                self._copy()
            except RuntimeError:  # a buffer has changed its shape
                self._plan(buffers)
                self._copy()

    def _is_planned(self, buffers: list[Tensor | None]) -> bool:
        planned = self._planned
        return planned is not None and len(planned) == len(buffers) and all(map(is_, planned, buffers))

    def _copy(self) -> None:
        with torch.no_grad():
            for copies in self._copies:
                torch._foreach_copy_(copies.saved, copies.buffers)

    def _list_modules(self) -> None:
        named = [*self._module.named_modules(), *self._hidden()]
        known = {id(memory.metric): memory for memory in self._metrics}
        self._metrics = [
            known.get(id(module)) or _MetricMemory(module)
            for _, module in named
            if isinstance(module, Metric) and is_undone(module)
        ]
        self._owners = [
            (f"{prefix}." if prefix else "", isinstance(module, _NormBase), module._buffers)
            for prefix, module in named
            if module._buffers
        ]
        self._empty = [module._buffers for _, module in named if not module._buffers]

    def _hidden(self) -> list[tuple[str, nn.Module]]:
        """Modules in lists, dictionaries and objects of the module, which torch does not list: a teacher, a helper."""
        listed = set(map(id, self._module.modules()))
        found = (one for one in reach(self._module, 0).owners if isinstance(one, nn.Module) and id(one) not in listed)
        self._hidden_modules = list(found)
        return [(f"{_HIDDEN}{id(one)}", one) for one in self._hidden_modules]

    def _plan(self, buffers: list[Tensor | None]) -> None:
        # A lazy buffer keeps its identity when the forward pass makes it, so a plan with one must not last.
        lazy = any(buffer is not None and is_lazy(buffer) for buffer in buffers)
        self._planned = None if lazy else buffers
        self._places = [(owned, key, buffer) for _, _, owned in self._owners for key, buffer in owned.items()]
        self._saved, self._watched = {}, []
        made = (buffer for buffer in buffers if buffer is not None and not is_lazy(buffer))
        self._odd = [_odd_copy(one) for one in made if not is_strided(one) and not one.is_inference()]
        groups: dict[Any, tuple[list[str], list[Tensor], list[int]]] = {}
        for name, buffer, normalises in self._touchable():
            if buffer.nbytes > self._limits.copied_bytes and not (normalises or name in self._live or self._thorough):
                self._watched.append((name, buffer, buffer._version))
                continue
            names, among, versions = groups.setdefault((buffer.dtype, buffer.device), ([], [], []))
            names.append(name)
            among.append(buffer)
            # Batch norm writes its statistics without changing their version counter.
            versions.append(-1 if normalises else buffer._version)
        self._copies = [_Copies(among, versions) for _, among, versions in groups.values()]
        for (names, _, _), copies in zip(groups.values(), self._copies, strict=True):
            self._saved.update(zip(names, copies.saved, strict=True))

    def _touchable(self) -> Iterator[tuple[str, Tensor, bool]]:
        seen: set[int] = set()
        for prefix, normalises, buffers in self._owners:
            for key, buffer in buffers.items():
                if buffer is None or is_lazy(buffer) or id(buffer) in seen or not _copied(buffer):
                    continue
                seen.add(id(buffer))
                yield prefix + key, buffer, normalises
        if self._thorough:
            hidden = (
                (f"{_HIDDEN}{id(one)}.{name}", parameter)
                for one in self._hidden_modules
                for name, parameter in one.named_parameters(recurse=False)
            )
            for name, parameter in (*self._module.named_parameters(), *hidden):
                if not (parameter.requires_grad or is_lazy(parameter)) and _copied(parameter):
                    yield name, parameter.data, False

    def before(self) -> dict[str, Tensor]:
        """The buffers as they were before the batch, by name. Buffers that it cannot have changed may be missing."""
        return dict(self._saved)

    def written(self) -> list[str]:
        """Names of the large buffers that this batch was the first to change, so that there is no copy of them."""
        return [name for name, buffer, version in self._watched if buffer._version != version]

    def undo_where(self, bad: Tensor) -> None:
        """Restore buffers if the 0-dim tensor ``bad`` is not 0. The device decides this, and the host does not wait."""
        conditions: dict[torch.device, Tensor] = {}
        with torch.no_grad():
            for copies in self._copies:
                if changed := copies.changed():
                    device = copies.flat.device
                    if device not in conditions:
                        # A copy to the host must be waited for, or other values would be read.
                        conditions[device] = bad.to(device, non_blocking=device.type == "cuda") != 0
                    copies.put_back_where(conditions[device], changed)

    def undo(self, *, buffers: bool = True) -> None:
        """Restore what the batch changed. This may be called again.

        Args:
            buffers: Whether to restore buffers too, and not only metrics and the caller's part.
        """
        if buffers:
            self._undo_buffers()
        for undo in (*self._undo, *self._also):
            undo()

    def _undo_buffers(self) -> None:
        for owned, key, before in self._places:
            if key in owned and owned[key] is not before:
                owned[key] = before  # the batch has put another tensor in its place
        buffers = {name: buffer for name, buffer, _ in self._touchable()}
        with torch.no_grad():
            for name, value in self._saved.items():
                live = buffers.get(name)
                if live is not None and live.shape == value.shape:
                    live.copy_(value)
        for buffer, copy, version in self._odd:
            if buffer._version != version and copy is not None:
                put(buffer, copy)


@final
class _Copies:
    """Copies of all buffers of one dtype and device in one block of memory, so that few calls are needed.

    Args:
        buffers: The buffers.
        versions: Their version counters at the time of the copy; −1 if writes do not change the counter.
    """

    __slots__ = ("_now", "buffers", "flat", "saved", "versions")

    def __init__(self, buffers: list[Tensor], versions: list[int]) -> None:
        self.buffers = buffers
        self.versions = versions
        self.flat, self.saved = self._memory()
        # The present values of the buffers; made when first needed.
        self._now: tuple[Tensor, list[Tensor]] | None = None

    def _memory(self) -> tuple[Tensor, list[Tensor]]:
        sizes = [buffer.numel() for buffer in self.buffers]
        flat = self.buffers[0].new_empty(sum(sizes))
        parts = flat.split(sizes)  # type: ignore[no-untyped-call]
        return flat, [part.view(buffer.shape) for part, buffer in zip(parts, self.buffers, strict=True)]

    def changed(self) -> list[int]:
        """Indices of the buffers that may have changed since the copy. Masks, for example, never change."""
        pairs = zip(self.buffers, self.versions, strict=True)
        return [index for index, (buffer, version) in enumerate(pairs) if buffer._version != version]

    def put_back_where(self, condition: Tensor, changed: list[int]) -> None:
        """Restore buffers if a condition on their device holds."""
        if self._now is None:
            self._now = self._memory()
        flat, now = self._now
        live, behind = [self.buffers[i] for i in changed], [now[i] for i in changed]
        torch._foreach_copy_(behind, live)
        torch.where(condition, self.flat, flat, out=flat)
        # Keep the version counters: a later backward pass may need these buffers, and gets the right values.
        with ExitStack() as versions:
            for buffer in live:
                versions.enter_context(_unsafe_preserve_version_counter(buffer))
            torch._foreach_copy_(live, behind)


def _copied(tensor: Tensor) -> bool:
    return is_strided(tensor) and writable(tensor)


def _odd_copy(buffer: Tensor) -> tuple[Tensor, Any, int]:
    try:
        return buffer, clone(buffer, None), buffer._version
    except Exception as error:  # when the batch is undone, this buffer is left as it is
        _logger.debug("NaNGuard: a buffer of type %s cannot be copied: %r", type(buffer).__name__, error)
        return buffer, None, -1


def is_undone(metric: Metric) -> bool:
    """Whether undoing a batch also undoes it in a metric. The guard's own metrics count skipped batches."""
    return not getattr(type(metric), "keep_when_skipped", False)


@final
class _MetricMemory:
    """Stores the states of a metric, and copies them only if they have changed since the last copy."""

    __slots__ = ("_marks", "_states", "metric")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._marks: list[tuple[Any, Any]] = []
        self._states: dict[str, Any] = {}

    def open(self) -> Undo:
        """Store the states before a batch; return a function that restores them."""
        metric = self.metric
        live = {name: getattr(metric, name) for name in metric._defaults}
        count, computed = metric._update_count, metric._computed
        # Lists, and tensors without a version counter, have changed if the count of updates has.
        marks = [(value, (count, _mark(value))) for value in live.values()]
        if len(marks) != len(self._marks) or not all(map(_same, marks, self._marks)):
            self._marks, self._states = marks, {name: _copy_state(value) for name, value in live.items()}
        states = self._states

        def undo() -> None:
            for name, value in states.items():
                setattr(metric, name, _copy_state(value))
            metric._update_count = count
            metric._computed = computed

        return undo


def _mark(state: Any) -> Any:
    """A value that changes if a state is written in place."""
    if isinstance(state, Tensor):
        return None if state.is_inference() else state._version
    return len(state), id(state[-1]) if state else None


def _same(mark: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return mark[0] is other[0] and mark[1] == other[1]


def _copy_state(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value)
