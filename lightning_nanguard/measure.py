"""From gradients and losses to one small reading: one pass over the gradients, at most one read by the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.events import Reading


def dense_values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient; for a sparse one those it stores, duplicates added up."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are, each as dense real numbers."""
    found = [p.grad for p in parameters if p.grad is not None]
    # Most are plain already, and a call for each costs more than the norm on a model of many small parameters.
    return [dense_values(g) if g.requires_grad or g.is_sparse or g.is_complex() else g for g in found]


def _on(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Without waiting only towards the device: a copy to the host would be read before it has arrived.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def total_norm(values: Sequence[Tensor]) -> Tensor:
    """2-norm over all tensors, a 0-dim float tensor on the first one's device.

    A finite result proves every element finite; the inverse does not hold, since squares overflow.
    """
    # Half precision overflows at 65,504, which is no unusual norm.
    half = any(value.dtype == torch.float16 for value in values)
    norms: Sequence[Tensor] = (
        [torch.linalg.vector_norm(value, dtype=torch.float32) for value in values]
        if half
        else torch._foreach_norm(list(values))
    )
    first = norms[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    stacked = torch.stack([_on(norm, first.device, dtype) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(stacked)
    return total


def exact_norm(values: Sequence[Tensor]) -> float:
    """2-norm in float64, for the rare gradient whose squares overflow its own precision. Reads from the device."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in values))


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite. Reads from the device."""
    return not suspects([tensor])


def suspects(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that hold a non-finite element; one read for each device, one more for each suspect."""
    sums: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0:
            indices, totals = sums.setdefault(tensor.device, ([], []))
            indices.append(index)
            # A finite sum proves every element finite in one cheap pass.
            totals.append(dense_values(tensor).sum(dtype=_WIDER.get(tensor.dtype)).to(torch.float32))
    bad: list[int] = []
    for indices, totals in sums.values():
        for index, total in zip(indices, torch.stack(totals).tolist(), strict=True):
            # An infinite one may be an overflow of the sum alone: look at every element.
            if not math.isfinite(total) and not bool(torch.isfinite(dense_values(tensors[index])).all()):
                bad.append(index)
    return sorted(bad)


_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def batch_finite(batch: Any) -> bool | None:
    """Whether every floating tensor in a nested batch is finite; ``None`` when it holds no floating tensor."""
    seen = False
    for tensor in floating_tensors(batch):
        seen = True
        if not all_finite(tensor):
            return False
    return True if seen else None


def floating_tensors(batch: Any) -> Iterable[Tensor]:
    """Every floating tensor in nested mappings and sequences."""
    if isinstance(batch, Tensor):
        if batch.is_floating_point() or batch.is_complex():
            yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from floating_tensors(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from floating_tensors(item)


@final
@dataclass(slots=True)
class PendingReading:
    """One update's loss and gradient norm on their way to the host.

    Attributes:
        step: The guard's clock.
        stream: Index of the optimizer.
        values: ``[loss, gradient norm, loss scale]`` on the device, or in host memory once copied.
        has_loss: Whether there was a loss.
        has_gradient: Whether there was a gradient.
        loss_scale: Whether a GradScaler's scale is among the values.
        held_back: Whether the device itself keeps a bad update from the weights.
        done: An event that says when ``values`` has arrived; ``None`` when it can be read at once.
    """

    step: int
    stream: int
    values: Tensor
    has_loss: bool
    has_gradient: bool
    loss_scale: bool = False
    held_back: bool = False
    done: Any = field(default=None)

    def send(self) -> None:
        """Start the copy to the host without waiting for the device."""
        if self.values.is_cuda:
            host = torch.empty(self.values.shape, dtype=self.values.dtype, pin_memory=True)
            host.copy_(self.values, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.values.device))
            self.values, self.done = host, event

    def is_bad(self) -> Tensor:
        """1.0 where the loss or the norm is not finite, else 0.0; a 0-dim tensor on the device."""
        return (~torch.isfinite(self.values[:2]).all()).to(torch.float32)

    def arrived(self) -> bool:
        """Whether reading it would not wait for the device."""
        return self.done is None or bool(self.done.query())

    def read(self, confirm: Callable[[], float | None] | None = None) -> Reading:
        """Bring it to the host.

        Args:
            confirm: Called when the norm is not finite; gives the exact norm of a gradient that is finite after
                all, ``None`` when it truly is not.
        """
        if self.done is not None:
            self.done.synchronize()
        loss, norm, scale = self.values.tolist()
        finite_gradient = not self.has_gradient or math.isfinite(norm)
        if not finite_gradient and confirm is not None:
            exact = confirm()
            if exact is not None:
                norm, finite_gradient = exact, True
        loss_finite = not self.has_loss or math.isfinite(loss)
        return Reading(
            step=self.step,
            stream=self.stream,
            loss=loss if self.has_loss else None,
            grad_norm=norm if self.has_gradient else None,
            finite=finite_gradient and loss_finite,
            loss_finite=loss_finite,
            loss_scale=scale if self.loss_scale else None,
        )


def pend(
    *,
    step: int,
    stream: int,
    losses: Sequence[Tensor],
    loss_factor: float,
    values: Sequence[Tensor],
    loss_scale: Tensor | None = None,
    gradients_scaled: bool = False,
) -> PendingReading | None:
    """Launch the measurement of one update; ``None`` when there is nothing to measure.

    Args:
        step: The guard's clock.
        stream: Index of the optimizer.
        losses: The update's micro-batch losses, as they were given to ``backward``.
        loss_factor: What undoes the division by the number of micro-batches.
        values: Dense gradients, from :func:`gradients`.
        loss_scale: The GradScaler's scale; losses are multiplied by it, and gradients when ``gradients_scaled``.
    """
    if not losses and not values:
        return None
    device = values[0].device if values else losses[0].device
    dtype = torch.float32
    if any(tensor.dtype == torch.float64 for tensor in (*losses[:1], *values[:1])):
        dtype = torch.float64
    zero = torch.zeros((), dtype=dtype, device=device)
    loss = zero
    if losses:
        parts = [_on(part.detach().reshape(-1), device, dtype) for part in losses]
        loss = (parts[0] if len(parts) == 1 else torch.cat(parts)).sum()
        if loss_factor != 1.0:
            loss = loss * loss_factor
    norm = total_norm(values).to(dtype) if values else zero
    if loss_scale is not None:
        scale = _on(loss_scale, device, dtype)
        loss = loss / scale
        if gradients_scaled:
            norm = norm / scale
    else:
        scale = zero
    return PendingReading(
        step,
        stream,
        torch.stack([loss, norm, scale]),
        has_loss=bool(losses),
        has_gradient=bool(values),
        loss_scale=loss_scale is not None,
    )
