"""Metrics of numerical health for a module's ``self.log``. They are torchmetrics and need neither guard nor Lightning.

No ``update`` reads a value on the host, so it does not wait for a GPU. This holds if the metric is on the device of its
inputs (as an attribute of the module is) and the inputs are not sparse. States are replaced, never changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nanguard.measure.norms import clamped, safe_norm, safe_total_norm, widest_dtype
from lightning_nanguard.measure.tensors import stored_values

Values = Tensor | float | Iterable[Tensor | None]
"""What a check is given: one tensor or number, or several tensors of which some may be ``None``."""


class _HealthMetric(Metric):
    """What the metrics of numerical health have in common."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    keep_when_skipped: ClassVar[bool] = True
    """A skipped batch must not vanish from here, though it leaves no trace in other metrics of the module."""


@final
class NonFiniteRate(_HealthMetric):
    """Share of updates whose values hold an element that is NaN or infinite.

    With several ranks it is the share of all their updates. Without an update it is 0. An update without any value,
    such as an empty list, counts as finite.

    Args:
        **kwargs: What every torchmetric takes, such as ``sync_on_compute``.

    Example:
        >>> import torch
        >>> rate = NonFiniteRate()
        >>> rate.update(torch.tensor([1.0, 2.0]))
        >>> rate.update([torch.tensor([1.0, float("nan")]), torch.tensor(3.0)])
        >>> rate.compute()
        tensor(0.5000)
    """

    plot_upper_bound = 1.0

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # One state (not finite, all) instead of two: ranks then exchange it at once.
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Values, times: int = 1) -> None:
        """Count one update, or several alike.

        Args:
            value: A loss, or several tensors, such as outputs or gradients; ``None`` among them is ignored.
            times: Number of updates that it counts for.
        """
        bad = ~_all_finite(value, self.counts.device)
        self.counts = self.counts + torch.stack((bad, torch.ones_like(bad))).to(self.counts.dtype) * times

    def compute(self) -> Tensor:
        """The share, from 0 to 1."""
        return self.counts[0] / self.counts[1].clamp(min=1)


@final
class NonFiniteCount(_HealthMetric):
    """Number of updates whose values hold an element that is NaN or infinite, summed over all ranks.

    Args:
        **kwargs: What every torchmetric takes, such as ``sync_on_compute``.

    Example:
        >>> import torch
        >>> count = NonFiniteCount()
        >>> for loss in (1.0, float("inf"), 2.0):
        ...     count.update(torch.tensor(loss))
        >>> count.compute()
        tensor(1)
    """

    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Values) -> None:
        """Count the update if it is not finite.

        Args:
            value: As for :meth:`NonFiniteRate.update`.
        """
        self.count = self.count + (~_all_finite(value, self.count.device)).to(self.count.dtype)

    def compute(self) -> Tensor:
        """The number so far."""
        return self.count


Reduction = Literal["mean", "max", "last"]


@final
class GradientNorm(_HealthMetric):
    """Mean, largest or last global 2-norm of the gradients.

    Norms that are not finite are counted in the state ``non_finite`` and left out of the result. Updates in which no
    parameter has a gradient are left out, too. Without a finite norm the result is NaN. A gradient whose elements are
    finite has a finite norm: squares do not overflow, and a norm above the largest float32 counts as the largest.

    Update it when gradients are whole and unscaled: in ``on_before_optimizer_step``. Under DDP every rank has the same
    gradients, so all ranks have the same result. If gradients differ, the mean and the largest are taken over all
    ranks, and the last is that of the highest rank that has one. If gradients are sharded, pass the norm that
    ``clip_grad_norm_`` returns.

    Args:
        reduction: ``"mean"``, ``"max"`` or ``"last"``.
        **kwargs: What every torchmetric takes, such as ``sync_on_compute``.

    Example:
        >>> import torch
        >>> norm = GradientNorm("max")
        >>> for value in (1.0, 3.0, float("inf"), 2.0):
        ...     norm.update(torch.tensor(value))
        >>> norm.compute(), norm.non_finite
        (tensor(3.), tensor(1))
    """

    finite: Tensor
    non_finite: Tensor

    def __init__(self, reduction: Reduction = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        allowed = get_args(Reduction)
        if reduction not in allowed:
            raise ValueError(f"GradientNorm(reduction={reduction!r}): expected one of {allowed}.")
        self.reduction = reduction
        # (number, mean, max, last) in one state, because a mean is merged by its number; a sum would overflow. float32
        # because not every device has float64, whatever the default type is when a half-precision module is made.
        self.add_state("finite", torch.zeros(4, dtype=torch.float32), dist_reduce_fx=_merged)
        self.add_state("non_finite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor | float | Iterable[Tensor]) -> None:
        """Take the norm of one update.

        Args:
            value: The parameters, as for ``torch.nn.utils.clip_grad_norm_``, or the norm itself, a number or a tensor
                of one element.

        Raises:
            TypeError: If ``value`` is neither.
            ValueError: If it is a tensor of several elements, or holds gradients instead of parameters.
        """
        norm = self._norm(value)
        if norm is None:
            return
        seen = norm.isfinite()
        # An all-zero row means that no norm was seen. Merging it changes nothing.
        row = torch.where(seen, torch.stack((torch.ones_like(norm), norm, norm, norm)), torch.zeros_like(norm))
        self.finite = _merged(torch.stack((self.finite, row.to(self.finite.dtype))))
        self.non_finite = self.non_finite + (~seen).to(self.non_finite.dtype)

    def compute(self) -> Tensor:
        """The reduced norm, NaN when no finite norm was seen."""
        number = self.finite[0]
        return torch.where(number > 0, self.finite[1 + get_args(Reduction).index(self.reduction)], torch.nan)

    def _norm(self, value: Tensor | float | Iterable[Tensor]) -> Tensor | None:
        device = self.finite.device
        if isinstance(value, (int, float)):
            largest = torch.finfo(torch.float32).max
            # Created on the device: a copy from the host would wait for it.
            return torch.full((), min(value, largest) if math.isfinite(value) else value, device=device).float()
        if isinstance(value, Tensor) and value.numel() == 1:
            # With sharded parameters clip_grad_norm_ returns a DTensor.
            given = value.full_tensor() if hasattr(value, "full_tensor") else value
            given = given.detach().reshape(()).to(device, widest_dtype(device))
            return clamped(given, given.isfinite())
        if isinstance(value, Tensor):
            raise ValueError(
                f"Expected argument `value` of GradientNorm to be a norm or the parameters, but got one tensor of "
                f"shape {tuple(value.shape)}. For a single parameter pass [parameter]."
            )
        norms = [safe_norm(values) for grad in _gradients(value) for values in _values(grad)]
        return safe_total_norm(norms, device) if norms else None


def _gradients(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    for parameter in _tensors(parameters, "GradientNorm", "the norm, or module.parameters()"):
        if not parameter.is_leaf or not (parameter.requires_grad or isinstance(parameter, torch.nn.Parameter)):
            raise ValueError(
                f"Expected argument `value` of GradientNorm to hold parameters, but got a tensor of shape "
                f"{tuple(parameter.shape)} that cannot have a gradient. Pass the parameters, not their gradients."
            )
        if parameter.grad is not None:
            yield parameter.grad


def _all_finite(value: Values, device: torch.device) -> Tensor:
    """Whether every element is finite, as a tensor of one boolean."""
    if isinstance(value, (int, float)):
        return torch.full((), math.isfinite(value), device=device)
    items = (value,) if isinstance(value, Tensor) else value
    tensors = _tensors(items, "a non-finite metric", "a tensor, or a list of tensors")
    # A norm is one pass without a mask in between, several times faster than isfinite().all().
    checks = [safe_norm(values).isfinite().to(device) for tensor in tensors for values in _values(tensor)]
    return torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool, device=device)


def _tensors(items: object, owner: str, expected: str) -> Iterator[Tensor]:
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise TypeError(f"Expected argument `value` of {owner} to be {expected}, but got {type(items).__name__}.")
    if isinstance(items, GeneratorType) and items.gi_frame is None:
        # A MetricCollection hands one generator to each of its metrics.
        raise ValueError(
            f"Expected argument `value` of {owner} to be {expected}, but got a generator that was used up before. "
            "Pass a list, such as list(module.parameters())."
        )
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif item is not None:
            hint = " Of a dictionary pass the values()." if isinstance(items, dict) else ""
            raise TypeError(
                f"Expected argument `value` of {owner} to hold tensors, but got {type(item).__name__} in it.{hint}"
            )


def _values(tensor: Tensor) -> Iterator[Tensor]:
    """The elements that are stored, as a dense tensor of a real floating type; nothing where none can be non-finite."""
    values = stored_values(tensor)
    if values.numel() and values.is_floating_point():
        yield values


def _merged(rows: Tensor) -> Tensor:
    """One row of (number, mean, max, last) for several, in the order in which they were seen."""
    numbers, means = rows[:, 0], rows[:, 1]
    number = numbers.sum()
    # Weighted by shares, because a sum would overflow; the shares may round to a little more than one.
    mean = (means * (numbers / number.clamp(min=1))).sum().clamp(max=torch.finfo(rows.dtype).max)
    # A later row wins only where it saw something. `take` because indexing with a tensor is read on the host.
    order = torch.arange(1, len(rows) + 1, device=rows.device) * (numbers > 0)
    return torch.stack((number, mean, rows[:, 2].max(), rows[:, 3].take(order.argmax())))
