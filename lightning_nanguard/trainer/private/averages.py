"""Averaged copies of the module that other callbacks keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_nanguard.state.learner import unwrapped
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds

_SHORT = frozenset({"ema", "avg", "swa"})
_AVERAGES = ("averag", "polyak", "shadow", "teacher")
# What an averaging callback keeps beside its average: the weights while they have changed places, or the best ones.
_OTHERS = frozenset({"backup", "best", "collected", "initial", "last", "original", "previous", "saved", "stored"})


def swaps_weights(trainer: Any) -> bool:
    """Whether a callback validates its average in the weights' place (WeightAveraging)."""
    return any(callable(getattr(callback, "_swap_models", None)) for callback in trainer.callbacks)


@final
class RepeatedAverages:
    """Has Lightning's ``WeightAveraging`` callbacks average an update that is made again.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._known: list[Any] = []

    def can_be_made_again(self, averages: Iterator[tuple[Any, Tensor]]) -> bool:
        """Whether every averaged copy is one of a callback that averages when it is told to."""
        self._known = [one for one in self._trainer.callbacks if callable(getattr(one, "should_update", None))]
        held = {
            id(tensor)
            for callback in self._known
            if isinstance(model := getattr(callback, "_average_model", None), torch.optim.swa_utils.AveragedModel)
            for tensor in (*model.parameters(), *model.buffers())
        }
        return all(id(tensor) in held for _, tensor in averages)

    def make_again(self, global_step: int) -> None:
        """An update has been made again: average it where it was averaged before.

        Args:
            global_step: The trainer's clock before the update.
        """
        self._update("_latest_update_step", global_step + 1, step_idx=global_step)

    def end_epoch_again(self, epoch: int) -> None:
        """The updates of an epoch have been made again: average them where they were averaged at its end.

        Args:
            epoch: Its index.
        """
        self._update("_latest_update_epoch", epoch, epoch_idx=epoch)

    def _update(self, latest: str, least: int, **index: int) -> None:
        for callback in self._known:
            model = getattr(callback, "_average_model", None)
            # What the callback has yet to average it will average by itself.
            if model is not None and getattr(callback, latest, -1) >= least and callback.should_update(**index):
                model.update_parameters(self._trainer.lightning_module)


@final
class AveragedCopies:
    """Finds the averaged copies of a module's weights that callbacks keep (EMA, SWA, WeightAveraging), by callback.

    Lightning has no public name for them. A module, a dictionary or a list of tensors may be one when it has the shapes
    (and names) of all parameters of the module, or of a part that holds a large share of what is trained, or of the
    trained ones among them. It is one where it is an ``AveragedModel`` or is called so, or once it was seen to change
    from one batch to the next to something else than the weights. Anything else a callback keeps, such as the best
    weights so far, is the user's and is left alone.

    Args:
        trainer: The trainer.
        module: Its module.
        thresholds: How large that share is, and how often unknown copies are looked at.
    """

    def __init__(self, trainer: Any, module: nn.Module, thresholds: CheckpointsThresholds | None = None) -> None:
        self._trainer = trainer
        self._module = module
        self._limits = CheckpointsThresholds() if thresholds is None else thresholds
        self._seen: set[str] = set()
        self._batches = 0
        # Unknown copies at the start of the batch before: their tensors, each with its version.
        self._before: dict[str, list[tuple[Tensor, int]]] = {}

    def __call__(self) -> dict[str, dict[str, Tensor]]:
        """The copies there are now."""
        return {name: tensors for name, tensors, known in self._candidates() if known}

    def watch(self) -> None:
        """At the start of a batch: see whether an unknown copy changes as averages do."""
        if self._before:
            now = {name: tensors for name, tensors, known in self._candidates() if not known}
            for name, before in self._before.items():
                if name in now and _differ(before, now[name]) and not self._are_weights(now[name]):
                    self._seen.add(name)
            self._before = {}
        elif self._batches % self._limits.copies_looked_at_every == 0:
            self._before = {
                name: [(tensor, _version(tensor)) for tensor in tensors.values()]
                for name, tensors, known in self._candidates()
                if not known
            }
        self._batches += 1

    def _candidates(self) -> Iterator[tuple[str, dict[str, Tensor], bool]]:
        found = [
            (f"{type(callback).__name__}.{attribute} ({index})", value, tensors)
            for index, callback in enumerate(self._trainer.callbacks)
            for attribute, value in vars(callback).items()
            if (tensors := _tensors_of(value))
        ]
        if not found:
            return
        shapes = list(_shapes_of_copies(self._module, self._limits.averaged_copy_share))
        live = {id(parameter) for parameter in self._module.parameters()}
        for name, value, tensors in found:
            # The live module under another name holds the very same tensors, and those are rewound already.
            if not any(id(tensor) in live for tensor in tensors.values()) and _is_copy(tensors, shapes):
                yield name, tensors, name in self._seen or _is_called_average(name, value)

    def _are_weights(self, tensors: dict[str, Tensor]) -> bool:
        live = list(self._module.state_dict(keep_vars=True).values())
        return all(
            any(_equal(mine, theirs) for theirs in live) for mine in tensors.values() if mine.is_floating_point()
        )


def _is_called_average(name: str, value: Any) -> bool:
    if isinstance(value, torch.optim.swa_utils.AveragedModel):
        return True
    # Words of CamelCase and snake_case: EMA, WeightAveraging, _average_model, shadow_params.
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    called = not _SHORT.isdisjoint(words) or any(word.startswith(_AVERAGES) for word in words)
    return called and _OTHERS.isdisjoint(words)


def _differ(before: list[tuple[Tensor, int]], now: dict[str, Tensor]) -> bool:
    return len(before) == len(now) and any(
        new is not old or _version(new) != version for (old, version), new in zip(before, now.values(), strict=True)
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _equal(one: Tensor, other: Any) -> bool:
    same = isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
    return same and bool(torch.equal(one.to(other.device), other))


def _shapes_of_copies(module: nn.Module, share: float) -> Iterator[dict[str, torch.Size]]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad and not _is_lazy(p))
    for part in module.modules():
        own = {name: parameter for name, parameter in part.named_parameters() if not _is_lazy(parameter)}
        learning = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        if own and sum(parameter.numel() for parameter in learning.values()) >= share * trained:
            yield {name: parameter.shape for name, parameter in own.items()}
            yield {name: parameter.shape for name, parameter in learning.items()}


def _is_lazy(parameter: Tensor) -> bool:
    lazy: bool = is_lazy(parameter)
    return lazy


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        return {} if isinstance(value, Metric) else dict([*value.named_parameters(), *value.named_buffers()])
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    # Before names are made: a callback may keep long lists of something else.
    if not items or not all(isinstance(item, Tensor) for item in items):
        return {}
    if isinstance(value, dict):
        return {str(name): item for name, item in value.items()}
    return {f"#{number}": item for number, item in enumerate(value)}


def _is_copy(tensors: dict[str, Tensor], parts: list[dict[str, torch.Size]]) -> bool:
    if "#0" in tensors:
        shapes = [tensor.shape for tensor in tensors.values()]
        return any(shapes == list(part.values()) for part in parts)
    named = {unwrapped(name): tensor.shape for name, tensor in tensors.items()}
    return any(all(named.get(name) == shape for name, shape in part.items()) for part in parts)
