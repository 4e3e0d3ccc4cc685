"""Puts the learner back to a snapshot: bitwise, in place, as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.measure.tensors import local
from lightning_nanguard.state.learner import CLOCK_KEYS, Learner, Scaler, StateKey
from lightning_nanguard.state.snapshot import Snapshot, clone, copy_all, fits


def restore(learner: Learner, snapshot: Snapshot, *, keep: Callable[[StateKey], bool] | None = None) -> None:
    """Put the learner back, in place; what either side lacks is left alone, optimizer state the snapshot lacks goes.

    Args:
        learner: What to put back.
        snapshot: To what; it is not changed and may be used again.
        keep: Says which paths to put back; all by default.
    """
    snapshot.wait()
    saved = snapshot.leaves if keep is None else {path: leaf for path, leaf in snapshot.leaves.items() if keep(path)}
    pairs = [(live, saved[path]) for path, live in learner.weights() if fits(live, saved.get(path))]
    names = learner.parameter_names()
    for index, optimizer in enumerate(learner.optimizers):
        if keep is None or keep(("optimizer", index)):
            _restore_optimizer(optimizer, index, learner.stepped(index), names, saved, snapshot.homes, pairs)
    if keep is None:
        averages = ((path, live) for path, live in learner.averages() if fits(live, saved.get(path)))
        pairs += [(live, saved[path]) for path, live in averages]
    copy_all([live for live, _ in pairs], [value for _, value in pairs])
    learner.restored()
    if learner.scaler is not None and snapshot.scaler and keep is None:
        _restore_scaler(learner.scaler, snapshot.scaler)


def mend_averages(learner: Learner, bad: Callable[[Iterable[tuple[StateKey, Any]]], str | None]) -> None:
    """Set averaged copies that no snapshot holds, since they began later, to the weights where they went bad.

    Args:
        learner: Whose copies.
        bad: Names a tensor that went bad, ``None`` where none did.
    """
    weights = {path[1]: leaf for path, leaf in learner.weights()}
    copies: dict[Any, list[tuple[StateKey, Tensor]]] = {}
    for path, tensor in learner.averages():
        copies.setdefault(path[1], []).append((path, tensor))
    for tensors in copies.values():
        if bad(tensors) is None:
            continue
        for path, tensor in tensors:
            source = weights.get(path[2].removeprefix("module."))
            if source is not None and fits(tensor, source):
                with torch.no_grad():
                    tensor.copy_(source)


def _restore_optimizer(
    optimizer: Optimizer,
    index: int,
    stepped: Iterable[Tensor],
    names: Mapping[int, str],
    saved: Mapping[StateKey, Any],
    homes: Mapping[StateKey, torch.device],
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
    if isinstance(live, Tensor) and fits(live, value):
        pairs.append((live, value))
    else:
        made = clone(value, live.device if isinstance(live, Tensor) else home)
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
