"""Finds the averaged copies of the module that other callbacks keep."""

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
# Names of other copies in an averaging callback: the original weights during a swap, or the best ones.
_OTHERS = frozenset({"backup", "best", "collected", "initial", "last", "original", "previous", "saved", "stored"})


def swaps_weights(trainer: Any) -> bool:
    """Whether a callback swaps its average into the module for validation (WeightAveraging)."""
    return any(callable(getattr(callback, "_swap_models", None)) for callback in trainer.callbacks)


@final
class RepeatedAverages:
    """Lets Lightning's ``WeightAveraging`` callbacks average updates that are made again."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._known: list[Any] = []

    def can_be_made_again(self, averages: Iterator[tuple[Any, Tensor]]) -> bool:
        """Whether every averaged copy belongs to a callback that can average on demand."""
        self._known = [one for one in self._trainer.callbacks if callable(getattr(one, "should_update", None))]
        held = {
            id(tensor)
            for callback in self._known
            if isinstance(model := getattr(callback, "_average_model", None), torch.optim.swa_utils.AveragedModel)
            for tensor in (*model.parameters(), *model.buffers())
        }
        return all(id(tensor) in held for _, tensor in averages)

    def make_again(self, global_step: int) -> None:
        """Average an update that was made again, if it was averaged the first time.

        Args:
            global_step: The trainer's clock before the update.
        """
        self._update("_latest_update_step", global_step + 1, step_idx=global_step)

    def end_epoch_again(self, epoch: int) -> None:
        """Average at the end of an epoch that was made again, if it was averaged there the first time."""
        self._update("_latest_update_epoch", epoch, epoch_idx=epoch)

    def _update(self, latest: str, least: int, **index: int) -> None:
        for callback in self._known:
            model = getattr(callback, "_average_model", None)
            # The callback will average later updates by itself.
            if model is not None and getattr(callback, latest, -1) >= least and callback.should_update(**index):
                model.update_parameters(self._trainer.lightning_module)


@final
class AveragedCopies:
    """Finds the averaged copies of a module's weights that callbacks keep (EMA, SWA, WeightAveraging), by callback.

    Lightning has no public name for them. A candidate is a module, a dictionary or a list of tensors with the shapes
    (and names) of all or of the trained parameters of the module, or of a large part of it. A candidate is a copy if it
    is an ``AveragedModel`` or has such a name, or once it changed between two batches to values other than the weights.
    Anything else, such as the best weights so far, belongs to the user and does not change.

    Args:
        trainer: The trainer.
        module: Its module.
        thresholds: How large the part must be, and how often unknown copies are checked.
    """

    def __init__(
        self, trainer: Any, module: nn.Module, thresholds: CheckpointsThresholds = CheckpointsThresholds()
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._limits = thresholds
        self._seen: set[str] = set()
        self._batches = 0
        # Tensors of unknown copies at the start of the previous batch, each with its version.
        self._before: dict[str, list[tuple[Tensor, int]]] = {}

    def __call__(self) -> dict[str, dict[str, Tensor]]:
        """The averaged copies at present."""
        return {name: tensors for name, tensors, known in self._candidates() if known}

    def watch(self) -> None:
        """At the start of a batch: check whether an unknown copy changes as averages do."""
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
            (f"{type(callback).__name__}.{attribute} ({index}{_epoch_of(callback)})", value, tensors)
            for index, callback in enumerate(self._trainer.callbacks)
            for attribute, value in vars(callback).items()
            if (tensors := _tensors_of(value))
        ]
        if not found:
            return
        shapes = list(_shapes_of_copies(self._module, self._limits.averaged_copy_share))
        live = {id(parameter) for parameter in self._module.parameters()}
        for name, value, tensors in found:
            # An alias of the module holds the same tensors, which are restored with the module.
            if not any(id(tensor) in live for tensor in tensors.values()) and _is_copy(tensors, shapes):
                yield name, tensors, name in self._seen or _is_called_average(name, value)

    def _are_weights(self, tensors: dict[str, Tensor]) -> bool:
        live = list(self._module.state_dict(keep_vars=True).values())
        return all(
            any(_equal(mine, theirs) for theirs in live) for mine in tensors.values() if mine.is_floating_point()
        )


def _epoch_of(callback: Any) -> str:
    """The epoch at whose start a ``StochasticWeightAveraging`` last averaged, as a part of its name.

    After the next average it is another copy, which no older snapshot has. A rollback must not undo that average,
    because the epoch does not start again.
    """
    return f", epoch {callback._latest_update_epoch}" if hasattr(type(callback), "swa_start") else ""


def _is_called_average(name: str, value: Any) -> bool:
    if isinstance(value, torch.optim.swa_utils.AveragedModel):
        return True
    # Splits CamelCase and snake_case names: EMA, WeightAveraging, _average_model, shadow_params.
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
    # Checked first, because a callback may keep long lists of other objects.
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
