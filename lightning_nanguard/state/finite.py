"""Finds the tensors of a learner that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_nanguard.measure.batches import floating_tensors, nested_tensors
from lightning_nanguard.measure.finite import has_nan, non_finite_indices
from lightning_nanguard.measure.tensors import dense_values, shape_of
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner, StateKey, describe, unwrapped

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""Names under which torch's optimizers keep averages or sums of squares of gradients."""


def allowances(leaves: Iterable[tuple[StateKey, Any]]) -> dict[StateKey, Tensor]:
    """The elements of weights and buffers that are non-finite by design (a mask of −inf): a bool mask by state key.

    Each mask has the shape of the numbers that the tensor stores, see
    :func:`~lightning_nanguard.measure.tensors.dense_values`.
    """
    weights = [(key, leaf) for key, leaf in leaves if key[0] in ("parameter", "buffer")]
    return {
        weights[index][0]: ~torch.isfinite(dense_values(weights[index][1]))
        for index in non_finite_indices([leaf for _, leaf in weights])
    }


def own_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the buffers that no normalisation layer keeps its statistics in. The module may put NaN or Inf there.

    Examples are padded histories, running minima, and means of classes that have not been seen yet.
    """
    statistics = {name for name, layer in module.named_modules() if isinstance(layer, _NormBase)}
    return frozenset(name for name, _ in module.named_buffers() if name.rpartition(".")[0] not in statistics)


def variances(module: nn.Module) -> frozenset[str]:
    """Names of the buffers that are running variances. These can never be negative."""
    return frozenset(
        f"{name}.running_var".lstrip(".")
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_var is not None and 0 <= (layer.momentum or 0.0) <= 1
    )


@final
class FiniteCheck:
    """Finds tensors of a learner that are not finite, for all parts of the guard that check its state.

    A negative running variance counts as not finite, because a normalising layer takes its root.

    Elements of weights and buffers that were not finite at the start of the fit are allowed. The module's own buffers
    (:func:`own_buffers`) are not checked: as long as loss and gradient are finite, no update depends on what they hold.
    Only :meth:`spoilt_buffer` looks at them. It does not look at buffers that were made or resized since the start (a
    mask made in the first forward pass), because nothing says what they should hold.

    Attributes:
        squares_overflow: Whether the gradients of this run are so large that their squares overflow. Second moments are
            then infinite, and the optimizer makes no update of these elements. Nothing is gained by restoring them.
    """

    def __init__(self) -> None:
        self.allowed: Mapping[StateKey, Tensor] = {}
        """The elements that may be non-finite, as :func:`allowances` gives them."""
        self._shapes: dict[StateKey, tuple[Any, ...]] = {}
        self._nan: set[StateKey] = set()
        self.squares_overflow = False
        self.own: frozenset[str] = frozenset()
        """Names of the buffers that are not checked."""
        self._variances: frozenset[str] = frozenset()

    def begin(self, learner: Learner) -> None:
        """Note the elements of the learner's weights and buffers that are not finite now: they are so by design."""
        weights = dict(learner.weights())
        self.allowed = allowances(weights.items())
        self._nan = {key for key in self.allowed if has_nan(weights[key])}
        self._shapes = {key: shape_of(leaf) for key, leaf in weights.items() if key[0] == "buffer"}
        self.own = own_buffers(learner.module)
        self._variances = variances(learner.module)

    def corrupt(self, leaves: Iterable[tuple[StateKey, Any]]) -> str | None:
        """Name of the first tensor with a non-finite element that is not allowed, ``None`` if there is none."""
        leaves = dict(leaves)
        flat = list(self._checked(leaves.items()))
        for index in non_finite_indices([tensor for _, tensor in flat]):
            key, tensor = flat[index]
            values = dense_values(tensor)
            try:
                corrupt = self._is_corrupt(key, values)
            except OutOfMemory:  # the check needs a quarter of the tensor's memory for masks
                corrupt = self._is_corrupt(key, values.cpu())
            if corrupt:
                negative = self._is_variance(key) and bool(torch.isfinite(leaves[key]).all())
                return f"the root of {describe(key)}" if negative else describe(key)
        return None

    def spoilt_buffer(self, leaves: Iterable[tuple[StateKey, Any]], before: Mapping[StateKey, Any]) -> str | None:
        """Name of the first of the module's own buffers that holds NaN, and held none before; ``None`` without one.

        Args:
            leaves: The present state.
            before: An earlier state with which the updates were finite.
        """

        def holds_nan(leaf: Any) -> bool:
            return any(map(has_nan, floating_tensors(leaf)))

        spoilt = (
            key
            for key, leaf in leaves
            if key[0] == "buffer" and key[1] in self.own and self._shapes.get(key) == shape_of(leaf)
            if key in before and holds_nan(leaf) and not holds_nan(before[key])
        )
        found = next(spoilt, None)
        return None if found is None else describe(found)

    def sized(self, leaves: Mapping[StateKey, Any]) -> Mapping[StateKey, Any]:
        """The leaves whose size tells something: all, or all but second moments if squares of gradients overflow."""
        return {key: leaf for key, leaf in leaves.items() if not self._may_overflow(key)}

    def _may_overflow(self, key: StateKey) -> bool:
        return self.squares_overflow and key[0] == "optimizer" and key[-1] in SECOND_MOMENTS

    def _is_corrupt(self, key: StateKey, values: Tensor) -> bool:
        bad = ~torch.isfinite(values)
        if self._may_overflow(key):
            bad &= values != torch.inf
        known = self._known(key, values)
        if known is not None:
            source, mask = known
            # An element that was Inf and became NaN is corrupt.
            wrong = torch.zeros_like(bad) if source in self._nan else torch.isnan(values)
            bad = torch.where(mask.to(bad.device), wrong, bad)
        return bool(bad.any())

    def to_be_finite(self, leaves: Iterable[tuple[StateKey, Any]]) -> Iterator[tuple[StateKey, Tensor]]:
        """The tensors that :meth:`corrupt` checks, set to zero where they may be non-finite. Waits for no device."""
        for key, tensor in self._checked(leaves):
            if any(source in self.allowed for source in _sources(key)):
                values = dense_values(tensor)
                known = self._known(key, values)
                if known is not None:
                    tensor = values.masked_fill(known[1].to(values.device, non_blocking=values.is_cuda), 0)
            yield key, tensor

    def _checked(self, leaves: Iterable[tuple[StateKey, Any]]) -> Iterator[tuple[StateKey, Tensor]]:
        for key, leaf in leaves:
            if key[0] == "own" or _name_of_buffer(key) in self.own:
                continue  # NaN or Inf may be intended, as in the best loss so far
            for tensor in nested_tensors(leaf):
                if key[0] != "buffer" or self._shapes.get(key) == shape_of(tensor):
                    yield key, tensor.sqrt() if self._is_variance(key) else tensor

    def _is_variance(self, key: StateKey) -> bool:
        return _name_of_buffer(key) in self._variances

    def _known(self, key: StateKey, values: Tensor) -> tuple[StateKey, Tensor] | None:
        for source in _sources(key):
            mask = self.allowed.get(source)
            if mask is not None and mask.shape == values.shape:
                return source, mask
        return None


def _sources(key: StateKey) -> tuple[StateKey, ...]:
    """Keys of the weights and buffers whose non-finite elements a leaf may have too."""
    # An averaged copy has the module's masks too, and may appear during a run. Optimizers keep copies of parameters.
    if key[0] == "average":
        return key, ("buffer", unwrapped(key[2])), ("parameter", unwrapped(key[2]))
    return (key, ("parameter", key[2])) if key[0] == "optimizer" else (key,)


def _name_of_buffer(key: StateKey) -> str | None:
    if key[0] == "average":
        return unwrapped(key[2])
    return key[1] if key[0] == "buffer" else None
