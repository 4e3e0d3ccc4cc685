"""Capture, check and restore the learner: bitwise, in place, as often as wanted from one snapshot."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.learner import CLOCK_KEYS, Learner, Path, Scaler, describe
from lightning_nanguard.measure import local, norms, size, suspects


def _clone(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        value = local(value).detach()
        if device is None:
            return value.clone()
        if value.is_cuda and device.type == "cpu" and value.layout == torch.strided:
            return _pinned_like(value).copy_(value, non_blocking=True)
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _clone(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item, device) for item in value)
    return copy.deepcopy(value)


def _pinned_like(value: Tensor) -> Tensor:
    # Only to pinned memory a copy goes on while the run does; a host may have a limit for it.
    try:
        return torch.empty_like(value, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(value, device="cpu")


def _home(value: Any) -> torch.device | None:
    return next((tensor.device for tensor in _tensors(value)), None)


def writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written in place: not an inference tensor, and no two elements in one place."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not tensor.is_inference() and not expanded


def _fits(live: Any, saved: Any) -> bool:
    if not isinstance(live, Tensor) or not isinstance(saved, Tensor):
        return False
    live = local(live)
    return (
        live.shape == saved.shape
        and live.dtype == saved.dtype
        and live.layout == saved.layout == torch.strided
        and writable(live)
    )


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    # One call for all tensors of a dtype and device pair: a loop of copy_ costs three times as much on small ones.
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        left, right = groups.setdefault((target.dtype, target.device, source.device), ([], []))
        left.append(local(target).detach())
        right.append(local(source).detach())
    with torch.no_grad():
        for left, right in groups.values():
            torch._foreach_copy_(left, right, non_blocking=left[0].is_pinned() and right[0].is_cuda)


@final
@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a tensor that all ranks hold.

    Attributes:
        part: Its bytes, padded to the same number on each rank.
        shape: The whole tensor's.
        dtype: The whole tensor's.
    """

    part: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held here."""
        return self.part.nbytes


@final
@dataclass(slots=True)
class Snapshot:
    """A copy of the learner; of sharded tensors this rank's own part.

    Attributes:
        step: The guard's clock when it was taken: the update with this number had been made.
        global_step: The trainer's.
        leaves: Path to copied value, or to a :class:`Share` of it.
        scaler: The GradScaler's state.
        rate: Scheduled learning rate of the first group.
        level: Loss level of the first stream when it was taken.
        healthy: Healthy readings seen since.
        typical: Root mean square of each tensor, from its :class:`~lightning_nanguard.glance.Glance`.
        done: Events that say when a copy to the host has arrived.
        homes: Where the originals lie, if the copies lie elsewhere.
    """

    step: int
    global_step: int
    leaves: dict[Path, Any]
    scaler: dict[str, Any] | None = None
    rate: float | None = None
    level: float | None = None
    healthy: int = 0
    typical: dict[Path, float] = field(default_factory=dict)
    done: list[Any] = field(default_factory=list)
    homes: dict[Path, torch.device] = field(default_factory=dict)

    def wait(self) -> None:
        """Let the host wait until it is there."""
        while self.done:
            self.done.pop().synchronize()

    def shared(self) -> bool:
        """Whether it must be put together from several ranks."""
        return any(isinstance(leaf, Share) for leaf in self.leaves.values())

    def nbytes(self) -> int:
        """Bytes of tensor memory it holds."""
        shares = sum(leaf.nbytes for leaf in self.leaves.values() if isinstance(leaf, Share))
        return shares + tensor_bytes(self.leaves)


def tensor_bytes(leaves: Mapping[Path, Any]) -> int:
    """Bytes of the tensors among some leaves."""
    return sum(size(leaf) for leaf in leaves.values() if isinstance(leaf, Tensor))


def allowances(leaves: Iterable[tuple[Path, Any]]) -> dict[Path, Tensor]:
    """Where buffers are non-finite by design (an attention mask of −inf): path to a bool mask of such elements."""
    buffers = [(path, leaf) for path, leaf in leaves if path[0] == "buffer"]
    return {
        buffers[index][0]: ~torch.isfinite(buffers[index][1].detach())
        for index in suspects([buffer for _, buffer in buffers])
    }


def jumped(now: Mapping[Path, Any], then: Mapping[Path, Any], names: Collection[Path], factor: float) -> str | None:
    """Name of the first tensor among ``names`` whose largest element has grown ``factor`` times, above 1."""
    pairs = [(path, now[path], then[path]) for path in now if path in names and path in then]
    pairs = [(path, one, other) for path, one, other in pairs if _comparable(one, other)]
    if not pairs:
        return None
    largest, was = (
        norms(tensors, math.inf) for tensors in ([one for _, one, _ in pairs], [two for _, _, two in pairs])
    )
    far = (path for (path, _, _), one, other in zip(pairs, largest, was, strict=True) if one > factor * max(other, 1.0))
    found = next(far, None)
    return None if found is None else describe(found)


def _comparable(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.is_floating_point() and 0 < one.numel() == other.numel()


def corrupt(
    leaves: Iterable[tuple[Path, Any]],
    allowed: Mapping[Path, Tensor],
    shapes: Mapping[Path, torch.Size] | None = None,
) -> str | None:
    """Name of the first tensor with a non-finite element that is not allowed, ``None`` when there is none.

    Args:
        leaves: What to look at.
        allowed: From :func:`allowances`.
        shapes: Buffers of the start of fit; one that was made or resized since (a mask built in the first forward) is
            left alone, since nothing says what it should hold.
    """
    flat = [(path, tensor) for path, leaf in leaves for tensor in _tensors(leaf)]
    for index in suspects([tensor for _, tensor in flat]):
        path, tensor = flat[index]
        if path[0] == "buffer" and shapes is not None and shapes.get(path) != tensor.shape:
            continue
        mask = _allowance(path, allowed)
        if mask is not None and mask.shape == tensor.shape:
            bad = ~torch.isfinite(tensor.detach())
            if not bool((bad & ~mask.to(bad.device)).any()):
                continue
        return describe(path)
    return None


def to_be_finite(
    leaves: Iterable[tuple[Path, Any]],
    allowed: Mapping[Path, Tensor],
    shapes: Mapping[Path, torch.Size],
) -> Iterator[tuple[Path, Tensor]]:
    """What :func:`corrupt` looks at, zero where it may be non-finite; waits for no device."""
    for path, leaf in leaves:
        for tensor in _tensors(leaf):
            if path[0] == "buffer" and shapes.get(path) != tensor.shape:
                continue
            mask = _allowance(path, allowed)
            if mask is None or mask.shape != tensor.shape:
                yield path, tensor
            else:
                yield path, tensor.masked_fill(mask.to(tensor.device, non_blocking=tensor.is_cuda), 0)


def _allowance(path: Path, allowed: Mapping[Path, Tensor]) -> Tensor | None:
    # An averaged copy holds the module's masks too, and may appear in mid-run.
    own = ("buffer", path[2].removeprefix("module.")) if path[0] == "average" else path
    return allowed.get(path, allowed.get(own))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def capture(
    learner: Learner,
    *,
    step: int,
    global_step: int,
    device: torch.device | None = None,
    reuse: Snapshot | None = None,
    leaves: Iterable[tuple[Path, Any]] | None = None,
) -> Snapshot:
    """Copy the learner.

    Args:
        learner: What to copy.
        step: The guard's clock.
        global_step: The trainer's.
        device: Where the copy lies; ``None`` beside the original.
        reuse: A snapshot no longer needed, whose memory is taken over.
        leaves: Copy only these paths.
    """
    old = reuse.leaves if reuse is not None else {}
    copied: dict[Path, Any] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    homes: dict[Path, torch.device] = {}
    for path, live in learner.leaves() if leaves is None else leaves:
        memory = old.get(path)
        if device is not None and (home := _home(live)) is not None:
            homes[path] = home
        if isinstance(memory, Tensor) and _fits(live, memory) and memory.device == (device or live.device):
            targets.append(memory)
            sources.append(live)
            copied[path] = memory
        else:
            copied[path] = _clone(live, device)
    _copy_all(targets, sources)
    scaler = dict(learner.scaler.state_dict()) if learner.scaler is not None else None
    return Snapshot(step, global_step, copied, scaler, homes=homes)


def restore(learner: Learner, snapshot: Snapshot, *, keep: Callable[[Path], bool] | None = None) -> None:
    """Put the learner back, in place; what either side lacks is left alone, optimizer state the snapshot lacks goes.

    Args:
        learner: What to put back.
        snapshot: To what; it is not changed and may be used again.
        keep: Says which paths to put back; all by default.
    """
    snapshot.wait()
    saved = snapshot.leaves if keep is None else {path: leaf for path, leaf in snapshot.leaves.items() if keep(path)}
    pairs = [(live, saved[path]) for path, live in learner.weights() if _fits(live, saved.get(path))]
    names = learner.parameter_names()
    for index, optimizer in enumerate(learner.optimizers):
        if keep is None or keep(("optimizer", index)):
            _restore_optimizer(optimizer, index, learner.stepped(index), names, saved, snapshot.homes, pairs)
    if keep is None:
        averages = ((path, live) for path, live in learner.averages() if _fits(live, saved.get(path)))
        pairs += [(live, saved[path]) for path, live in averages]
    _copy_all([live for live, _ in pairs], [value for _, value in pairs])
    learner.restored()
    if learner.scaler is not None and snapshot.scaler and keep is None:
        _restore_scaler(learner.scaler, snapshot.scaler)


def mend_averages(learner: Learner, bad: Callable[[Iterable[tuple[Path, Any]]], str | None]) -> None:
    """Set averaged copies that no snapshot holds, since they began later, to the weights where they went bad.

    Args:
        learner: Whose copies.
        bad: Names a tensor that went bad, ``None`` where none did.
    """
    weights = {path[1]: leaf for path, leaf in learner.weights()}
    copies: dict[Any, list[tuple[Path, Tensor]]] = {}
    for path, tensor in learner.averages():
        copies.setdefault(path[1], []).append((path, tensor))
    for tensors in copies.values():
        if bad(tensors) is None:
            continue
        for path, tensor in tensors:
            source = weights.get(path[2].removeprefix("module."))
            if source is not None and _fits(tensor, source):
                with torch.no_grad():
                    tensor.copy_(source)


def _restore_optimizer(
    optimizer: Optimizer,
    index: int,
    stepped: Iterable[Tensor],
    names: Mapping[int, str],
    saved: Mapping[Path, Any],
    homes: Mapping[Path, torch.device],
    pairs: list[tuple[Tensor, Tensor]],
) -> None:
    wanted: dict[str, dict[Any, tuple[Any, torch.device | None]]] = {}
    for path, value in saved.items():
        if path[:2] == ("optimizer", index):
            wanted.setdefault(path[2], {})[path[3]] = value, homes.get(path)
    for parameter in stepped:
        entries = wanted.get(names.get(id(parameter), f"#{id(parameter)}"))
        if not entries:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for key in [key for key in state if key not in entries]:
            del state[key]
        for key, (value, home) in entries.items():
            _put(state, key, value, home, pairs, like=parameter)
    for number, group in enumerate(optimizer.param_groups):
        known = {path[3]: value for path, value in saved.items() if path[:3] == ("group", index, number)}
        for key in [key for key in group if known and key not in known and key not in CLOCK_KEYS]:
            del group[key]
        for key, value in known.items():
            _put(group, key, value, homes.get(("group", index, number, key)), pairs)


def _put(
    owner: dict[Any, Any],
    key: Any,
    value: Any,
    home: torch.device | None,
    pairs: list[tuple[Tensor, Tensor]],
    like: Tensor | None = None,
) -> None:
    live = owner.get(key)
    if isinstance(live, Tensor) and _fits(live, value):
        pairs.append((live, value))
    else:
        made = _clone(value, live.device if isinstance(live, Tensor) else home)
        owner[key] = made if like is None else _sharded_like(made, like)


def _sharded_like(value: Any, parameter: Tensor) -> Any:
    mine = local(parameter)
    if mine is parameter or not isinstance(value, Tensor) or value.shape != mine.shape:
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        value.to(mine.device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def _restore_scaler(scaler: Scaler, saved: Mapping[str, Any]) -> None:
    now = scaler.state_dict()
    if not now:
        return
    # Never back to a larger scale: the present one is what the scaler learned from the overflows since.
    scaler.load_state_dict({**saved, "scale": min(float(now["scale"]), float(saved["scale"]))})
