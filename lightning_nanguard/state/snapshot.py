"""Snapshots: copies of the learner."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import is_
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.measure.tensors import is_strided, local, shape_of, size
from lightning_nanguard.state.device import Device, Event, OutOfMemory
from lightning_nanguard.state.learner import Learner, StateKey, describe
from lightning_nanguard.state.side_copy import CopyCheck

_logger = logging.getLogger("lightning_nanguard")


def clone(value: Any, device: torch.device | None) -> Any:
    """A copy of a leaf of the learner on a device, ``None`` for the leaf's own. Waits for the copy."""
    if isinstance(value, Tensor):
        value = local(value).detach()
        if is_strided(value):
            return value.clone() if device is None else value.to(device, copy=True)
        return _clone_odd(value, None if value.is_meta else device)
    if isinstance(value, dict):
        return {key: clone(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clone(item, device) for item in value)
    return copy.deepcopy(value)


def _clone_odd(value: Tensor, device: torch.device | None) -> Tensor:
    try:
        return value.clone() if device is None else value.to(device, copy=True)
    except NotImplementedError:  # for a subclass that supports few operations, copy its inner tensors
        parts, context = _parts(value)
        copies = {name: clone(part, device) for name, part in parts.items()}
        made: Tensor = type(value).__tensor_unflatten__(copies, context, value.size(), value.stride())  # type: ignore[attr-defined]
        return made


def _parts(value: Any) -> tuple[dict[str, Tensor], Any]:
    if not hasattr(value, "__tensor_flatten__"):
        raise NotImplementedError(f"{type(value).__name__} has no __tensor_flatten__")
    names, context = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}, context


_NOTHING = object()


def _cloned(key: StateKey, value: Any, device: torch.device | None) -> Any:
    # What cannot be copied is not guarded. The run must not fail because of it.
    try:
        return clone(value, device)
    except OutOfMemory:
        raise
    except Exception as error:
        _say_left_out(describe(key), f"{type(value).__module__}.{type(value).__qualname__}", repr(error))
        return _NOTHING


@cache
def _say_left_out(what: str, kind: str, why: str) -> None:
    _logger.info("NaNGuard: %s, a %s, cannot be copied, so no rollback restores it: %s", what, kind, why)


def writable(tensor: Tensor) -> bool:
    """Whether a strided tensor can be written in place: no inference tensor, and no two elements in the same memory."""
    if tensor.is_inference():
        return False
    lengths = () if tensor.is_contiguous() else zip(tensor.stride(), tensor.shape, strict=True)
    return not any(stride == 0 and length > 1 for stride, length in lengths)


def fits(live: Any, saved: Any) -> bool:
    """Whether ``saved`` can be copied into ``live`` in place, together with others in one call."""
    if not isinstance(live, Tensor) or not isinstance(saved, Tensor):
        return False
    live = local(live)
    return (
        is_strided(live)
        and is_strided(saved)
        and live.shape == saved.shape
        and live.dtype == saved.dtype
        and writable(live)
    )


def put(live: Tensor, saved: Tensor) -> bool:
    """Copy a tensor that does not fit in this way into another one of its kind; return whether this was possible.

    Sparse, nested and quantised tensors, and tensors of subclasses, are copied one by one.
    """
    if type(live.detach()) is not type(saved) or live.layout != saved.layout or shape_of(live) != shape_of(saved):
        return False
    try:
        with torch.no_grad():
            _put(live, saved)
    except Exception as error:
        _logger.debug("NaNGuard: a %s could not be copied in place: %r", type(live).__name__, error)
        return False
    return True


def _put(live: Tensor, saved: Tensor) -> None:
    try:
        live.copy_(saved)
    except NotImplementedError:
        mine, theirs = _parts(live)[0], _parts(saved)[0]
        for name, part in mine.items():
            _put(part, theirs[name])


def copy_all(targets: list[Tensor], sources: list[Tensor], device: Device) -> None:
    """Copy each source into its target. Copies from a device to the host are not waited for."""
    # Use one call for each pair of dtype and device: a loop of copy_ takes three times as long for small tensors.
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        mine, its = local(target), local(source)
        comes = device.where(its) if device.where(mine) is None else None
        # To hash a device takes longer than to copy a small tensor.
        host = comes is None and mine.is_cpu and its.is_cpu
        key = (mine.dtype, comes) if host else (mine.dtype, mine.device, its.device, comes)
        left, right = groups.setdefault(key, ([], []))
        left.append(mine)
        right.append(its)
    for (*_, comes), (left, right) in groups.items():
        if comes is None:
            with torch.no_grad():
                torch._foreach_copy_(left, right)
        else:
            device.to_host([one.detach() for one in left], [one.detach() for one in right])


@final
@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a tensor that all ranks hold.

    Attributes:
        part: The bytes of the part, padded to the same number on each rank.
        shape: Shape of the whole tensor.
        dtype: Dtype of the whole tensor.
    """

    part: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return self.part.nbytes


@final
class Bound:
    """Tensors of the learner, with their copies on the same devices.

    Args:
        held: The objects that the learner consists of; see :meth:`~lightning_nanguard.state.learner.Learner.held`.
        leaves: The learner's leaves.
        copies: The copies by state key.
    """

    __slots__ = ("_groups", "_held", "_kinds", "_tensors")

    def __init__(
        self, held: Sequence[Any], leaves: Iterable[tuple[StateKey, Any]], copies: Mapping[StateKey, Any]
    ) -> None:
        pairs = [(value, copies[key]) for key, value in leaves if isinstance(value, Tensor)]
        self._held = held
        self._tensors = [live for live, _ in pairs]
        self._kinds = [(one.shape, one.dtype) for one in self._tensors]
        self._groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for live, stored in pairs:
            group = self._groups.setdefault((live.dtype, live.device), ([], []))
            group[0].append(local(live))
            group[1].append(stored)

    def holds(self, held: Sequence[Any]) -> bool:
        """Whether the learner still consists of the same tensors and values."""
        same = len(held) == len(self._held) and all(map(is_, held, self._held))
        return same and self._kinds == [(one.shape, one.dtype) for one in self._tensors]

    def store(self) -> None:
        """Copy the learner's tensors."""
        with torch.no_grad():
            for live, stored in self._groups.values():
                torch._foreach_copy_(stored, live)

    def restore(self) -> None:
        """Copy the values back into the learner's tensors."""
        with torch.no_grad():
            for live, stored in self._groups.values():
                torch._foreach_copy_(live, stored)


@final
@dataclass(slots=True)
class Snapshot:
    """A copy of the learner. Of a sharded tensor it has the shard of this rank.

    Attributes:
        step: Number of the last update before it was taken.
        global_step: ``global_step`` of the trainer at that time.
        leaves: State key to copied value, or to a :class:`Share` of it.
        scaler: State of the GradScaler.
        rate: Effective learning rate of the first group.
        level: Loss level of the first optimizer at that time, in the units of the loss itself.
        healthy: Number of healthy readings since.
        typical: Root mean square of each tensor, from its :class:`~lightning_nanguard.state.norm_screen.NormScreen`.
        done: Events that say when a copy to the host has arrived.
        check: Says whether the background copy has the right values.
        homes: Device of each original, if the copies are elsewhere.
        left_out: State keys of values that could not be copied.
        bound: The tensors of the learner, and those of its weights alone, if a
            :class:`~lightning_nanguard.state.switch.StateSwitch` has stored them.
    """

    step: int
    global_step: int
    leaves: dict[StateKey, Any]
    scaler: dict[str, Any] | None = None
    rate: float | None = None
    level: float | None = None
    healthy: int = 0
    typical: dict[StateKey, float] = field(default_factory=dict)
    done: list[Event] = field(default_factory=list)
    check: CopyCheck = field(default_factory=CopyCheck)
    homes: dict[StateKey, torch.device] = field(default_factory=dict)
    left_out: set[StateKey] = field(default_factory=set)
    bound: tuple[Bound, Bound] | None = None

    def wait(self) -> None:
        """Let the host wait until the copy has arrived."""
        while self.done:
            self.done.pop().synchronize()

    def intact(self) -> bool:
        """Whether nothing wrote to the learner while it was copied. Waits for the copy."""
        self.wait()
        return self.check.intact()

    def device(self) -> torch.device | None:
        """The device of the copies; ``None`` for that of the originals."""
        tensors = (leaf for leaf in self.leaves.values() if isinstance(leaf, Tensor))
        return next((leaf.device for leaf in tensors), None) if self.homes else None

    def shared(self) -> bool:
        """Whether several ranks store it together, a part each."""
        return any(isinstance(leaf, Share) for leaf in self.leaves.values())

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        shares = sum(leaf.nbytes for leaf in self.leaves.values() if isinstance(leaf, Share))
        return shares + tensor_bytes(self.leaves)


def tensor_bytes(leaves: Mapping[StateKey, Any]) -> int:
    """Bytes of the tensors among some leaves."""
    return sum(size(local(leaf)) for leaf in leaves.values() if isinstance(leaf, Tensor))


def capture(
    learner: Learner,
    *,
    step: int,
    global_step: int,
    device: torch.device | None = None,
    reuse: Snapshot | None = None,
    leaves: Iterable[tuple[StateKey, Any]] | None = None,
    copy: Callable[[list[Tensor], list[Tensor]], None] | None = None,
) -> Snapshot:
    """Copy the learner.

    Args:
        learner: What to copy.
        step: Number of the last update.
        global_step: ``global_step`` of the trainer.
        device: Device of the copy; ``None`` for that of the original.
        reuse: A snapshot that is no longer needed, whose memory is used again.
        leaves: The leaves to copy; by default all.
        copy: Copies tensors into others that are like them, and says itself when they have arrived. By default they are
            copied after the work of the run so far.
    """
    old = reuse.leaves if reuse is not None else {}
    copied: dict[StateKey, Any] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    homes: dict[StateKey, torch.device] = {}
    left_out: set[StateKey] = set()
    fresh: list[tuple[StateKey, Tensor]] = []
    for key, live in learner.leaves() if leaves is None else leaves:
        if device is not None and (home := next((one.device for one in nested_tensors(live)), None)) is not None:
            homes[key] = home
        memory = _memory_for(live, old.get(key), device)
        if memory is not None:
            targets.append(memory)
            sources.append(live)
            copied[key] = memory
        elif _goes_without_wait(live, device, learner.device):
            fresh.append((key, live))
        elif (made := _cloned(key, live, device)) is not _NOTHING:
            copied[key] = made
        else:
            left_out.add(key)
    for (key, live), memory in zip(
        fresh, learner.device.pinned_alike([local(live).detach() for _, live in fresh]), strict=True
    ):
        targets.append(memory)
        sources.append(live)
        copied[key] = memory
    done: list[Event] = []
    if copy is not None:
        copy(targets, sources)
    else:
        copy_all(targets, sources, learner.device)
        done = learner.device.mark(sources) if device is not None else []
    scaler = dict(learner.scaler.state_dict()) if learner.scaler is not None else None
    return Snapshot(step, global_step, copied, scaler, done=done, homes=homes, left_out=left_out)


def capture_whole(learner: Learner) -> Snapshot:
    """Copy the learner for a short time: to its own device, or to host memory if the device has no room."""
    try:
        return capture(learner, step=0, global_step=0)
    except OutOfMemory:
        return capture(learner, step=0, global_step=0, device=torch.device("cpu"))


def _memory_for(live: Any, old: Any, device: torch.device | None) -> Tensor | None:
    """The memory of an older copy of a leaf, if the leaf fits into it."""
    fitting = isinstance(old, Tensor) and fits(live, old) and old.stride() == local(live).stride()
    if not fitting or old.device != (device or live.device):
        return None
    memory: Tensor = old
    return memory


def _goes_without_wait(live: Any, device: torch.device | None, source: Device) -> bool:
    """Whether a leaf is on a device and its copy in host memory, so that the copy is not waited for."""
    to_host = device is not None and device.type == "cpu"
    return to_host and isinstance(live, Tensor) and is_strided(local(live)) and source.where(local(live)) is not None
