"""Restores the learner from a snapshot: bit for bit and in place, as often as needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import CLOCK_KEYS, Learner, StateKey, describe, name_in_keys, states_of, unwrapped
from lightning_nanguard.state.snapshot import Snapshot, capture, clone, copy_all, fits, put, writable
from lightning_nanguard.thresholds.fixed import LEAST_LOSS_SCALE

_Pair = tuple[Tensor, Tensor]
"""A live tensor, and the tensor that is copied into it."""


def is_weight(key: StateKey) -> bool:
    """Whether a leaf is a parameter or a buffer."""
    return key[0] in ("parameter", "buffer")


def restore(
    learner: Learner, snapshot: Snapshot, *, keep: Callable[[StateKey], bool] = lambda key: True
) -> tuple[StateKey, ...]:
    """Restore the learner from a snapshot, in place.

    Values that only one of the two has do not change. But optimizer state that the snapshot lacks is removed.

    Args:
        learner: The learner to restore.
        snapshot: The snapshot. It does not change and may be used again.
        keep: Says for each state key whether to restore it; by default all. The key of the GradScaler is
            ``("scaler",)``. For the state of a whole optimizer the key is ``("optimizer", index)``.

    Returns:
        Keys of the weights and buffers that both have but that could not be restored, because their shape has changed.
    """
    snapshot.wait()
    saved = {key: leaf for key, leaf in snapshot.leaves.items() if keep(key)}
    pairs, failed = _restore_weights(learner, saved)
    names = learner.parameter_names()
    for index, optimizer in enumerate(learner.optimizers):
        for prefix, state in states_of(optimizer, index):
            if keep(prefix):
                pairs += _restore_state(prefix, state, learner.stepped(index), names, saved, snapshot)
        pairs += _restore_groups(optimizer, index, saved, snapshot)
        if keep(("own", index)):
            pairs += _restore_own(learner, index, names, saved, snapshot)
    averages = ((key, live) for key, live in learner.averages() if fits(live, saved.get(key)))
    pairs += [(live, saved[key]) for key, live in averages]
    copy_all([live for live, _ in pairs], [value for _, value in pairs], learner.device)
    learner.restored()
    if learner.scaler is not None and snapshot.scaler and keep(("scaler",)):
        restore_scaler(learner.scaler, snapshot.scaler)
    return failed


def weights_if_room(
    learner: Learner, keep: Callable[[StateKey], bool] = is_weight, device: torch.device | None = None
) -> Snapshot | None:
    """A copy of weights and buffers, to restore them after :func:`part_of_snapshot`; ``None`` without room for it.

    Args:
        learner: The learner.
        keep: Says which of their state keys are copied.
        device: Where the copy is kept; ``None`` for the device of each tensor.
    """
    leaves = [(key, leaf) for key, leaf in learner.weights() if keep(key)]
    try:
        return capture(learner, step=0, global_step=0, leaves=leaves, device=device)
    except OutOfMemory:
        return None


@contextmanager
def part_of_snapshot(
    learner: Learner, snapshot: Snapshot, own: Snapshot, keep: Callable[[StateKey], bool] = is_weight
) -> Iterator[None]:
    """Context in which a part of the learner has the values of a snapshot. At its end the part is restored bit for bit.

    Args:
        learner: The learner.
        snapshot: The state inside the context. It does not change.
        own: The present state.
        keep: Says which state keys change; by default weights and buffers.
    """
    restore(learner, snapshot, keep=keep)
    try:
        yield
    finally:
        restore(learner, own, keep=keep)


def _restore_weights(learner: Learner, saved: Mapping[StateKey, Any]) -> tuple[list[_Pair], tuple[StateKey, ...]]:
    pairs: list[_Pair] = []
    failed: list[StateKey] = []
    for key, live in learner.weights():
        value = saved.get(key)
        if not isinstance(value, Tensor):
            continue
        if fits(live, value):
            pairs.append((live, value))
        elif not put(live, value) and not (is_strided(live) and not writable(live)):
            failed.append(key)
    return pairs, tuple(failed)


_NONE: Mapping[StateKey, StateKey] = {}


def average_of(key: StateKey, untrained: Mapping[StateKey, StateKey] = _NONE) -> StateKey | None:
    """The averaged copy, or the untrained part, that a leaf belongs to; ``None`` for other leaves.

    Such a copy or part is restored as a whole.

    Args:
        key: State key of the leaf.
        untrained: The result of :meth:`Learner.untrained`.
    """
    return key[:2] if key[0] == "average" else untrained.get(key)


def bad_averages(
    leaves: Iterable[tuple[StateKey, Any]],
    corrupt: Callable[[Iterable[tuple[StateKey, Any]]], str | None],
    place: str = "",
    untrained: Mapping[StateKey, StateKey] = _NONE,
) -> frozenset[StateKey]:
    """The averaged copies and untrained parts that are bad, as :func:`average_of` names them.

    Args:
        leaves: Leaves of a learner, or of a snapshot.
        corrupt: Names a tensor that is not finite, ``None`` if all are.
        place: Name of another tensor that is bad.
        untrained: The result of :meth:`Learner.untrained`.
    """
    parts: dict[StateKey, list[tuple[StateKey, Any]]] = {}
    for key, tensor in leaves:
        part = average_of(key, untrained)
        if part is not None:
            parts.setdefault(part, []).append((key, tensor))
    return frozenset(
        part
        for part, tensors in parts.items()
        if any(describe(key) == place for key, _ in tensors) or corrupt(tensors) is not None
    )


def mend_averages(learner: Learner, corrupt: Callable[[Iterable[tuple[StateKey, Any]]], str | None]) -> None:
    """Set corrupt averaged copies to the weights. This is for copies that began after the last snapshot was taken.

    Args:
        learner: The learner with the copies.
        corrupt: Names a tensor that is not finite, ``None`` if all are.
    """
    weights = {key[1]: leaf for key, leaf in learner.weights()}
    bad = bad_averages(learner.averages(), corrupt)
    for key, tensor in learner.averages():
        source = weights.get(unwrapped(key[2])) if average_of(key) in bad else None
        if source is not None and fits(tensor, source):
            with torch.no_grad():
                tensor.copy_(source)


def mend_statistics(learner: Learner, snapshot: Snapshot) -> None:
    """Restore the numbers of running statistics that are not finite, and negative variances, if no update uses them.

    Args:
        learner: The learner with the statistics.
        snapshot: The snapshot that they are taken from.
    """
    snapshot.wait()
    idle = learner.idle_statistics(snapshot.leaves)
    for key, live in learner.weights():
        saved = snapshot.leaves.get(key)
        if key in idle and isinstance(saved, Tensor) and fits(live, saved):
            good = torch.isfinite(live.sqrt() if key[1].endswith("running_var") else live)
            with torch.no_grad():
                live.copy_(torch.where(good, live, saved.to(live.device)))


def _restore_state(
    prefix: StateKey,
    state: MutableMapping[Any, Any],
    stepped: Iterable[Tensor],
    names: Mapping[int, str],
    saved: Mapping[StateKey, Any],
    snapshot: Snapshot,
) -> list[_Pair]:
    wanted: dict[str, dict[Any, tuple[Any, torch.device | None]]] = {}
    for state_key, value in saved.items():
        if state_key[: len(prefix)] == prefix:
            name, key = state_key[len(prefix) :]
            wanted.setdefault(name, {})[key] = value, snapshot.homes.get(state_key)
    pairs: list[_Pair] = []
    for parameter in stepped:
        name = name_in_keys(names, parameter)
        entries, own = wanted.get(name, {}), state.get(parameter, {})
        left_out = {key for key in own if (*prefix, name, key) in snapshot.left_out}
        if not entries and not left_out:
            state.pop(parameter, None)
            continue
        own = state.setdefault(parameter, {})
        for key in [key for key in own if key not in entries and key not in left_out]:
            del own[key]
        for key, (value, home) in entries.items():
            pairs += _put(own, key, value, home, like=parameter)
    places = {name: place for place, name in enumerate(wanted)}
    known = {parameter: places[name] for parameter in state if (name := names.get(id(parameter))) in places}
    if list(known.values()) != sorted(known.values()):  # the optimizer's state_dict has this order
        for parameter in sorted(known, key=known.__getitem__):
            state[parameter] = state.pop(parameter)
    return pairs


def _restore_groups(optimizer: Optimizer, index: int, saved: Mapping[StateKey, Any], snapshot: Snapshot) -> list[_Pair]:
    pairs: list[_Pair] = []
    for number, group in enumerate(optimizer.param_groups):
        known = {state_key[3]: value for state_key, value in saved.items() if state_key[:3] == ("group", index, number)}
        kept = {*known, *CLOCK_KEYS, *(key[3] for key in snapshot.left_out if key[:3] == ("group", index, number))}
        for key in [key for key in group if known and key not in kept]:
            del group[key]
        for key, value in known.items():
            pairs += _put(group, key, value, snapshot.homes.get(("group", index, number, key)))
    return pairs


def _restore_own(
    learner: Learner, index: int, names: Mapping[int, str], saved: Mapping[StateKey, Any], snapshot: Snapshot
) -> list[_Pair]:
    pairs: list[_Pair] = []
    live = {key: (owner, name) for key, owner, name in learner.own_leaves(index, names)}
    for key, (owner, name) in live.items():
        if len(key) == 4 and isinstance(name, Tensor) and key not in saved and key not in snapshot.left_out:
            del owner[name]  # state of a parameter that began after the snapshot
    attributes = vars(learner.optimizers[index])
    parameters = {names[id(one)]: one for one in learner.stepped(index) if id(one) in names}
    for key, value in saved.items():
        if key[:2] == ("own", index):
            owner = attributes if len(key) == 3 else attributes.get(key[2], {})
            name = key[2] if len(key) == 3 else parameters.get(key[3], key[3])
            owner, name = live.get(key, (owner, name))
            pairs += _put(owner, name, value, snapshot.homes.get(key))
    return pairs


def _put(
    owner: dict[Any, Any], key: Any, value: Any, home: torch.device | None, like: Tensor | None = None
) -> list[_Pair]:
    # Return the pairs that can be copied in place, so that one call copies all of them.
    live = owner.get(key)
    if isinstance(live, Tensor) and fits(live, value):
        return [(live, value)]
    if isinstance(live, Tensor) and isinstance(value, Tensor) and not is_strided(live) and put(live, value):
        return []
    made = clone(value, live.device if isinstance(live, Tensor) else home)
    owner[key] = made if like is None else _sharded_like(made, like)
    return []


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


def restore_scaler(scaler: GradScaler, saved: Mapping[str, Any]) -> None:
    """Restore a GradScaler, except that its scale is never raised."""
    now = scaler.state_dict()
    if not now:
        return
    scale = float(now["scale"])
    # Never raise the scale: the GradScaler has lowered the present one after overflows. A scale that is not finite, or
    # that has no 32-bit inverse, does not come from overflows.
    usable = LEAST_LOSS_SCALE <= scale < math.inf
    scale = min(scale, float(saved["scale"])) if usable else float(saved["scale"])
    scaler.load_state_dict({**saved, "scale": scale})
