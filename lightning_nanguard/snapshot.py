"""Capture, certify and restore the learner: bitwise, in place, as often as wanted from one snapshot.

The learner is what learns: parameters, buffers, optimizer state (and what optimizers keep in their groups), the
GradScaler's growth tracker, averaged copies. The clock is not part of it: learning rates, schedulers, progress.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nanguard.measure import suspects

Path = tuple[Any, ...]

# Schedulers write these: they belong to the clock, and a rollback leaves them as they are.
_CLOCK_KEYS = frozenset(
    {
        "params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay",
        "momentum", "base_momentum", "max_momentum", "betas",
    }
)  # fmt: skip


class Scaler(Protocol):
    """What is used of a ``torch.amp.GradScaler``."""

    def state_dict(self) -> dict[str, Any]:
        """Its scale and growth tracker."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back."""


def _ready(tensor: Tensor) -> bool:
    return not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


@final
class Learner:
    """The live state of a run that may be rewound, as paths to tensors and plain values.

    Args:
        module: The module trained.
        optimizers: Its optimizers.
        scaler: The GradScaler, if there is one.
        averages: Gives averaged copies of the module kept elsewhere (EMA, SWA), by name; asked anew each time, since
            such copies come and go.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: Scaler | None = None,
        averages: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict,
    ) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        self.scaler = scaler
        self._averages = averages

    def weights(self) -> Iterator[tuple[Path, Tensor]]:
        """Parameters and buffers (also those that are not persistent)."""
        for name, parameter in self.module.named_parameters():
            if _ready(parameter):
                yield ("parameter", name), parameter
        for name, buffer in self.module.named_buffers():
            if _ready(buffer):
                yield ("buffer", name), buffer

    def parameter_names(self) -> dict[int, str]:
        """Identity of every parameter to its name; tied ones keep the first."""
        return {id(parameter): name for name, parameter in self.module.named_parameters()}

    def optimizer_leaves(self, index: int) -> Iterator[tuple[Path, Any]]:
        """State of one optimizer and what it keeps in its groups."""
        optimizer = self.optimizers[index]
        names = self.parameter_names()
        for parameter, entry in optimizer.state.items():
            name = names.get(id(parameter), f"#{id(parameter)}") if isinstance(parameter, Tensor) else str(parameter)
            yield from _leaves(("optimizer", index, name), entry)
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in _CLOCK_KEYS:
                    yield ("group", index, number, key), value

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Everything that is rewound, except the scaler."""
        yield from self.weights()
        for index in range(len(self.optimizers)):
            yield from self.optimizer_leaves(index)
        for owner, tensors in self._averages().items():
            for name, tensor in tensors.items():
                yield ("average", owner, name), tensor

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name a user understands."""
        return {describe(path): leaf for path, leaf in self.leaves() if isinstance(leaf, Tensor)}


def describe(path: Path) -> str:
    """A path in words: ``"parameter net.0.weight"``, ``"optimizer state exp_avg of net.0.weight"``."""
    match path:
        case ("optimizer", int(), str(name), *keys):
            return f"optimizer state {'.'.join(map(str, keys))} of {name}"
        case ("group", int(index), int(number), str(key)):
            return f"{key} in group {number} of optimizer {index}"
        case ("average", str(owner), str(name)):
            return f"{name} in the averaged copy of {owner}"
        case (str(kind), str(name)):
            return f"{kind} {name}"
    return " ".join(map(str, path))


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    # Lists and dictionaries of tensors (LBFGS's history) are taken whole, since their length changes.
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, key), item
    else:
        yield path, value


def _clone(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value.to(device, copy=True) if device is not None else value.clone()
    if isinstance(value, dict):
        return {key: _clone(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item, device) for item in value)
    return copy.deepcopy(value)


def _fits(live: Any, saved: Any) -> bool:
    return (
        isinstance(live, Tensor)
        and isinstance(saved, Tensor)
        and live.shape == saved.shape
        and live.dtype == saved.dtype
        and live.layout == saved.layout == torch.strided
    )


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    # One call for all tensors of a dtype and device pair: a loop of copy_ costs three times as much on small ones.
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        left, right = groups.setdefault((target.dtype, target.device, source.device), ([], []))
        left.append(target.detach())
        right.append(source.detach())
    with torch.no_grad():
        for left, right in groups.values():
            torch._foreach_copy_(left, right)


@final
@dataclass(slots=True)
class Snapshot:
    """A copy of the learner.

    Attributes:
        step: The guard's clock when it was taken: the update with this number had been made.
        global_step: The trainer's.
        leaves: Path to copied value.
        scaler: The GradScaler's state.
        rate: Scheduled learning rate of the first group.
        level: Loss level of the first stream when it was taken.
        healthy: Healthy readings seen since.
    """

    step: int
    global_step: int
    leaves: dict[Path, Any]
    scaler: dict[str, Any] | None = None
    rate: float | None = None
    level: float | None = None
    healthy: int = 0

    def nbytes(self) -> int:
        """Bytes of tensor memory it holds."""
        return sum(leaf.nbytes for leaf in self.leaves.values() if isinstance(leaf, Tensor))

    def first_non_finite(self, allowed: Mapping[Path, Tensor]) -> str | None:
        """Name of the first tensor that is not finite where it was at the start of fit; see :func:`allowances`."""
        return corrupt(self.leaves.items(), allowed)


def allowances(leaves: Iterable[tuple[Path, Any]]) -> dict[Path, Tensor]:
    """Where buffers are non-finite by design (an attention mask of −inf): path to a bool mask of such elements."""
    buffers = [(path, leaf) for path, leaf in leaves if path[0] == "buffer"]
    return {
        buffers[index][0]: ~torch.isfinite(buffers[index][1].detach())
        for index in suspects([buffer for _, buffer in buffers])
    }


def corrupt(leaves: Iterable[tuple[Path, Any]], allowed: Mapping[Path, Tensor]) -> str | None:
    """Name of the first tensor with a non-finite element that is not allowed, ``None`` when there is none."""
    flat = [(path, tensor) for path, leaf in leaves for tensor in _tensors(leaf)]
    for index in suspects([tensor for _, tensor in flat]):
        path, tensor = flat[index]
        mask = allowed.get(path)
        if mask is not None and mask.shape == tensor.shape:
            bad = ~torch.isfinite(tensor.detach())
            if not bool((bad & ~mask.to(bad.device)).any()):
                continue
        return describe(path)
    return None


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
    leaves: Iterator[tuple[Path, Any]] | None = None,
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
    for path, live in learner.leaves() if leaves is None else leaves:
        memory = old.get(path)
        if _fits(live, memory):
            targets.append(memory)
            sources.append(live)
            copied[path] = memory
        else:
            copied[path] = _clone(live, device)
    _copy_all(targets, sources)
    scaler = dict(learner.scaler.state_dict()) if learner.scaler is not None else None
    return Snapshot(step, global_step, copied, scaler)


def restore(learner: Learner, snapshot: Snapshot, *, keep: Callable[[Path], bool] | None = None) -> None:
    """Put the learner back, in place; what either side lacks is left alone, optimizer state the snapshot lacks goes.

    Args:
        learner: What to put back.
        snapshot: To what; it is not changed and may be used again.
        keep: Says which paths to put back; all by default.
    """
    saved = snapshot.leaves
    targets: list[Tensor] = []
    sources: list[Tensor] = []

    def put(path: Path, live: Any, assign: Callable[[Any], None]) -> None:
        if keep is not None and not keep(path):
            return
        value = saved[path]
        if _fits(live, value):
            targets.append(live)
            sources.append(value)
        else:
            assign(_clone(value, live.device if isinstance(live, Tensor) else None))

    for path, live in learner.weights():
        if path in saved and _fits(live, saved[path]):
            put(path, live, lambda _: None)
    for index, optimizer in enumerate(learner.optimizers):
        if keep is not None and not keep(("optimizer", index)):
            continue
        _restore_optimizer(optimizer, index, learner.parameter_names(), saved, put)
    for path, live in learner.leaves():
        if path[0] == "average" and path in saved and _fits(live, saved[path]):
            put(path, live, lambda _: None)
    _copy_all(targets, sources)
    if learner.scaler is not None and snapshot.scaler and keep is None:
        _restore_scaler(learner.scaler, snapshot.scaler)


def _restore_optimizer(
    optimizer: Optimizer,
    index: int,
    names: Mapping[int, str],
    saved: Mapping[Path, Any],
    put: Callable[[Path, Any, Callable[[Any], None]], None],
) -> None:
    entries: dict[str, dict[Any, Any]] = {}
    for path in saved:
        if path[0] == "optimizer" and path[1] == index:
            if len(path) > 3:
                entries.setdefault(path[2], {})[path[3]] = path
            else:
                entries.setdefault(path[2], {})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        name = names.get(id(parameter), f"#{id(parameter)}")
        wanted = entries.get(name)
        if not wanted:
            optimizer.state.pop(parameter, None)
            continue
        entry = optimizer.state[parameter]
        for key in [key for key in entry if key not in wanted]:
            del entry[key]
        for key, path in wanted.items():
            put(path, entry.get(key), lambda value, entry=entry, key=key: entry.__setitem__(key, value))
    for number, group in enumerate(optimizer.param_groups):
        for key in list(group):
            path = ("group", index, number, key)
            if path in saved:
                put(path, group[key], lambda value, group=group, key=key: group.__setitem__(key, value))


def _restore_scaler(scaler: Scaler, saved: Mapping[str, Any]) -> None:
    now = scaler.state_dict()
    if not now:
        return
    # Never back to a larger scale: the present one is what the scaler learned from the overflows since.
    scaler.load_state_dict({**saved, "scale": min(float(now["scale"]), float(saved["scale"]))})


@final
class Ring:
    """Certified snapshots, newest first, and the one still pending.

    When it is full, the oldest goes, but never the one with the best loss level: a fault found late needs a state
    from before it began.

    Args:
        capacity: Certified snapshots kept.
        certify_after: Healthy readings a pending snapshot waits for.
    """

    def __init__(self, capacity: int = 3, certify_after: int = 2) -> None:
        self.capacity = capacity
        self.certify_after = certify_after
        self.certified: list[Snapshot] = []
        self.pending: Snapshot | None = None
        self._spare: list[Snapshot] = []

    def spare(self) -> Snapshot | None:
        """Memory to use again, if there is some."""
        return self._spare.pop() if self._spare else None

    def add(self, snapshot: Snapshot) -> None:
        """Take a new snapshot, pending; the older pending one goes."""
        self.drop_pending()
        self.pending = snapshot

    def drop_pending(self) -> None:
        """The state it holds is under suspicion."""
        if self.pending is not None:
            self._recycle(self.pending)
            self.pending = None

    def healthy(self) -> bool:
        """Count a healthy reading; whether the pending snapshot has waited long enough."""
        if self.pending is None:
            return False
        self.pending.healthy += 1
        return self.pending.healthy >= self.certify_after

    def certify(self) -> None:
        """The pending snapshot is good."""
        assert self.pending is not None
        self.certified.insert(0, self.pending)
        self.pending = None
        if len(self.certified) > self.capacity:
            self._recycle(self.certified.pop(self._worst()))

    def discard_newer(self, depth: int) -> Snapshot:
        """Drop the ``depth`` newest and return the one that is then newest."""
        depth = min(depth, len(self.certified) - 1)
        for _ in range(depth):
            self._recycle(self.certified.pop(0))
        return self.certified[0]

    def _worst(self) -> int:
        last = len(self.certified) - 1
        levels = [snapshot.level for snapshot in self.certified]
        oldest = levels[last]
        newer = [level for level in levels[:last] if level is not None]
        if last >= 2 and oldest is not None and newer and oldest < min(newer):
            return last - 1
        return last

    def _recycle(self, snapshot: Snapshot) -> None:
        if len(self._spare) < 1:
            self._spare.append(snapshot)
