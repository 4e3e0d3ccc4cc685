"""Loss and gradient norm of one update as one small tensor on the device, read at once or up to two updates later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor

from lightning_nanguard.measure.norms import total_norm
from lightning_nanguard.measure.tensors import moved_to
from lightning_nanguard.types import Reading


class SentNumbers(Protocol):
    """Numbers on their way from the device to the host."""

    def arrived(self) -> bool:
        """Whether :meth:`read` would not wait for the device."""

    def read(self) -> list[float]:
        """Wait until the numbers have arrived, and return them."""


@final
@dataclass(slots=True)
class PendingReading:
    """Loss and gradient norm of one update that are not read yet. :meth:`read` makes a reading from them.

    Attributes:
        step: Number of the update.
        optimizer_index: Index of the optimizer.
        loss: Sum of the losses that were passed to ``backward``, from :func:`sum_of`; ``None`` without one.
        norms: Partial gradient norms, 0-dim, from :func:`partial_norms`; empty without a gradient.
        loss_scale: The loss scale of a GradScaler; ``None`` without one.
        loss_factor: Factor that undoes the division of the loss by the number of micro-batches.
        gradients_scaled: Whether the gradients are multiplied by the loss scale, like the loss.
        held_back: Whether the optimizer skips the update on the device if it is bad.
    """

    step: int
    optimizer_index: int
    loss: Tensor | None
    norms: Sequence[Tensor]
    loss_scale: Tensor | None = None
    loss_factor: float = 1.0
    gradients_scaled: bool = False
    held_back: bool = False
    _copy: SentNumbers | None = field(default=None, init=False)
    _packed: Tensor | None = field(default=None, init=False)

    def packed(self) -> Tensor:
        """Norm, loss and loss scale, as far as they exist, as one tensor on the device of the norm."""
        if self._packed is None:
            norm = [total_norm(self.norms)] if self.norms else []
            parts = [*norm, *(part for part in (self.loss, self.loss_scale) if part is not None)]
            device = parts[0].device
            dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
            self._packed = torch.stack([moved_to(part, device, dtype) for part in parts])
        return self._packed

    def send(self, read_later: Callable[[Tensor], SentNumbers]) -> None:
        """Start the copy to the host without waiting for the device.

        Args:
            read_later: Sends numbers to the host.
        """
        self._copy = read_later(self.packed())

    def is_bad(self, *, by_loss: bool = True) -> Tensor:
        """1.0 if loss or norm is not finite, else 0.0; a 0-dim float32 tensor on the device.

        Args:
            by_loss: Whether the loss counts. It must not if ranks have different losses.
        """
        packed = self.packed() if by_loss else self.packed()[: bool(self.norms)]
        # A finite number minus itself is 0. NaN and Inf give NaN.
        return (packed - packed).sum().ne(0).to(torch.float32)

    def arrived(self) -> bool:
        """Whether reading the numbers would not wait for the device."""
        return self._copy is None or self._copy.arrived()

    def read(self, confirm: Callable[[], float | None] | None = None) -> Reading:
        """Wait until the numbers have arrived, and return the reading.

        Args:
            confirm: Called if the norm is not finite. It returns the exact norm if the gradient is finite and only its
                norm has overflowed; ``None`` if the gradient is not finite.
        """
        norm, loss, scale = self._numbers()
        if loss is not None:
            loss *= self.loss_factor
        finite_gradient = norm is None or math.isfinite(norm)
        if not finite_gradient and confirm is not None:
            exact = confirm()
            if exact is not None:
                norm, finite_gradient = exact, True
        if scale is not None:
            # With a loss scale of zero the loss is unknown. The GradScaler skips such a step.
            loss = None if loss is None or scale == 0 else loss / scale
            if norm is not None and self.gradients_scaled:
                norm = norm / abs(scale) if scale else math.nan
                finite_gradient = finite_gradient and scale != 0
        loss_finite = loss is None or math.isfinite(loss)
        return Reading(
            step=self.step,
            optimizer_index=self.optimizer_index,
            loss=loss,
            grad_norm=norm,
            finite=finite_gradient and loss_finite,
            loss_finite=loss_finite,
            loss_scale=scale,
        )

    def _numbers(self) -> tuple[float | None, float | None, float | None]:
        numbers = iter(self.packed().tolist() if self._copy is None else self._copy.read())
        return (
            next(numbers) if self.norms else None,
            None if self.loss is None else next(numbers),
            None if self.loss_scale is None else next(numbers),
        )


def sum_of(losses: Sequence[Tensor]) -> Tensor | None:
    """Sum of some losses, 0-dim, on the device of the first one; ``None`` without one."""
    if not losses:
        return None
    first = losses[0]
    if len(losses) == 1 and first.dim() == 0:
        return first
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.cat([moved_to(part.reshape(-1), first.device, dtype) for part in losses]).sum()
