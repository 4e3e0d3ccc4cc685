"""Readings of the updates at hand: losses and gradients of the learner, measured without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from lightning_nanguard.blocking import unscales_itself
from lightning_nanguard.events import Reading
from lightning_nanguard.learner import Learner
from lightning_nanguard.measure import (
    PendingReading,
    exact_norm,
    gradients,
    partial_norms,
    pend,
    plain,
    suspects,
    total_norm,
)


@final
class Meter:
    """Measures what is about to step.

    Args:
        learner: What is trained.
        micro_batches: By how many micro-batches the loss is divided.
    """

    def __init__(self, learner: Learner, micro_batches: Callable[[], int]) -> None:
        self._learner = learner
        self._micro_batches = micro_batches
        self._measured: dict[int, int] = {}
        self._among = 1
        self.losses: list[Tensor] = []

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one backward, as it is given to it."""
        self._among = self._micro_batches()
        loss = loss.detach()
        # A captured graph writes the next micro-batch's loss to the same place.
        self.losses.append(loss.clone() if self._among > 1 else loss)

    def measure(self, step: int, stream: int) -> PendingReading | None:
        """Loss and gradient of update ``step``, on their way; ``None`` where there is neither."""
        if stream in self._learner.quasi_newton:
            self._measured[stream] = self._measured.get(stream, 0) + 1
        scale = self.loss_scale()
        return pend(
            step=step,
            stream=stream,
            losses=self.losses,
            loss_factor=self._among / len(self.losses) if self.losses else 1.0,
            values=self._gradients(stream),
            loss_scale=scale,
            gradients_scaled=scale is not None and unscales_itself(self._learner.optimizers[stream]),
        )

    def read(self, pending: PendingReading) -> Reading:
        """Wait for a reading of the gradients at hand."""
        return pending.read(lambda: self._confirm(pending.stream))

    def _confirm(self, stream: int) -> float | None:
        values = self._gradients(stream)
        return None if suspects(values) else exact_norm(values)

    def norm(self, stream: int) -> float:
        """Norm of the gradients at hand, in this process."""
        values = self._gradients(stream)
        return float(total_norm(partial_norms(values))) if values else 0.0

    def bad_gradient(self, stream: int) -> str | None:
        """The first gradient at hand that is not finite, in words."""
        names = self._learner.parameter_names()
        groups = self._learner.optimizers[stream].param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        bad = suspects(gradients(parameters))
        return f"gradient of {names.get(id(parameters[bad[0]]), 'a parameter')}" if bad else None

    def loss_scale(self) -> Tensor | None:
        """What the GradScaler multiplies losses by; ``None`` without one."""
        # The tensor itself: get_scale() reads from the device.
        return None if self._learner.scaler is None else getattr(self._learner.scaler, "_scale", None)

    def tries(self, stream: int) -> bool:
        """Whether what was measured last is of a further closure of the same step, which only tries a place out."""
        return self._measured.get(stream, 1) > 1

    def end_batch(self) -> None:
        """Closures are counted anew."""
        self._measured.clear()

    def _gradients(self, stream: int) -> list[Tensor]:
        groups = self._learner.optimizers[stream].param_groups
        return plain([grad for group in groups for p in group["params"] if (grad := p.grad) is not None])
