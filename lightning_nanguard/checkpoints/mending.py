"""Replaces the state in a checkpoint by the last good state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_nanguard.checkpoints.poison import is_optimizer_state, is_weight
from lightning_nanguard.state.learner import Learner, StateKey, name_in_keys, unwrapped


def mended(checkpoint: Mapping[str, Any], learner: Learner, good: Mapping[StateKey, Any]) -> dict[str, Any]:
    """Return a copy of a checkpoint with a good state. Its counters, schedulers and scores do not change.

    Args:
        checkpoint: The checkpoint that is about to be written. It is not changed.
        learner: The learner whose state it holds.
        good: The good state by its keys, such as the leaves of a snapshot.
    """
    weights = {key[1]: leaf for key, leaf in good.items() if key[0] in ("parameter", "buffer")}
    averages: dict[str, dict[str, Tensor]] = {}
    for key, leaf in good.items():
        if key[0] == "average":
            averages.setdefault(key[1], {})[unwrapped(key[2])] = leaf
    swapped = "current_model_state" in checkpoint  # WeightAveraging saves the average as the weights
    optimizers = [_optimizer_state(learner, index, good) for index in range(len(learner.optimizers))]

    def mend(value: Any, where: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            if is_optimizer_state(value):
                # Lightning saves them in order. Elsewhere, such as in a callback's state, only the sizes tell.
                known = optimizers[int(where[1]) :][:1] if where[:1] == ("optimizer_states",) else optimizers
                return _with_good_state(value, known)
            averaged = where[:1] == ("callbacks",) or (swapped and where == ("state_dict",))
            names = {key for key, item in value.items() if isinstance(item, Tensor) and is_weight(key, item, weights)}
            source = _average_of(names, averages.values(), weights) if averaged else weights
            return {
                key: source[unwrapped(key)] if key in names else mend(item, (*where, str(key)))
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(mend(item, (*where, str(number))) for number, item in enumerate(value))
        return value

    result: dict[str, Any] = mend(checkpoint, ())
    return result


def _average_of(
    names: set[str], averages: Iterable[dict[str, Tensor]], weights: dict[str, Tensor]
) -> Mapping[str, Tensor]:
    """The averaged copy that has all these names. The weights stand in for names that it lacks, or if there is none."""
    wanted = {unwrapped(name) for name in names}
    fitting = next((average for average in averages if wanted <= average.keys()), {})
    return {**weights, **fitting}


def _optimizer_state(learner: Learner, index: int, good: Mapping[StateKey, Any]) -> dict[str, Any]:
    """The good state of an optimizer and the values in its groups, numbered as in its ``state_dict()``."""
    names = learner.parameter_names()
    packed = learner.optimizers[index].state_dict()
    by_name: dict[str, dict[Any, Any]] = {}
    for key, leaf in good.items():
        if key[:2] == ("optimizer", index):
            by_name.setdefault(key[2], {})[key[3]] = leaf
    parameters = [p for group in learner.optimizers[index].param_groups for p in group["params"]]
    numbers = [number for group in packed["param_groups"] for number in group["params"]]
    named = [name_in_keys(names, parameter) for parameter in parameters]
    state = {number: by_name[name] for number, name in zip(numbers, named, strict=True) if name in by_name}
    own = [
        {key[3]: leaf for key, leaf in good.items() if key[:3] == ("group", index, number)}
        for number in range(len(packed["param_groups"]))
    ]
    return {"state": state, "param_groups": own, "sizes": _sizes(packed)}


def _with_good_state(value: Mapping[str, Any], optimizers: Sequence[dict[str, Any]]) -> Any:
    """An optimizer's state in a checkpoint, replaced by the good state of the optimizer with the same group sizes."""
    for good in optimizers:
        if good["sizes"] == _sizes(value):
            groups = [{**group, **own} for group, own in zip(value["param_groups"], good["param_groups"], strict=True)]
            return {**value, "state": good["state"], "param_groups": groups}
    return value


def _sizes(packed: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in packed["param_groups"]]
