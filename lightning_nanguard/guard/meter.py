"""Readings of the updates at hand: losses and gradients of the learner, measured without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import final

from torch import Tensor

from lightning_nanguard.act.skip import unscales_itself
from lightning_nanguard.measure.finite import suspects
from lightning_nanguard.measure.norms import exact_norm, partial_norms, total_norm
from lightning_nanguard.measure.readings import PendingReading, pend
from lightning_nanguard.measure.tensors import is_at_hand, plain
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.types import Reading


@final
class Meter:
    """Measures what is about to step.

    Args:
        learner: What is trained.
        micro_batches: By how many micro-batches the loss is divided.
        several: Whether an update may have several losses even so, as under manual optimization.
    """

    def __init__(self, learner: Learner, micro_batches: Callable[[], int], *, several: bool = False) -> None:
        self._learner = learner
        self._micro_batches = micro_batches
        self._several = several
        self._measured: dict[int, int] = {}
        self._among = 1
        self.losses: list[Tensor] = []

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one backward, as it is given to it."""
        self._among = self._micro_batches()
        loss = loss.detach()
        # A captured graph writes the next loss to the same place.
        self.losses.append(loss.clone() if self._several or self._among > 1 else loss)

    def measure(self, step: int, optimizer_index: int) -> PendingReading | None:
        """Loss and gradient of update ``step``, on their way; ``None`` where there is neither."""
        return self._pend(step, optimizer_index, self._launch(optimizer_index))

    def take(self, step: int, optimizer_index: int) -> Reading | None:
        """Loss and gradient of update ``step``, waited for; ``None`` where there is neither."""
        norms, losses = self._launch(optimizer_index), self.losses
        # The short way, where the numbers are at hand and fine: most updates on a CPU go by it.
        if losses and norms and self._learner.scaler is None and all(map(is_at_hand, (*losses, *norms))):
            norm, loss = math.hypot(*map(float, norms)), sum(map(float, losses)) * self._among / len(losses)
            if math.isfinite(norm) and math.isfinite(loss):
                return Reading(step, optimizer_index, loss, norm)
        pending = self._pend(step, optimizer_index, norms)
        return None if pending is None else pending.read(partial(self._confirm, optimizer_index))

    def _launch(self, optimizer_index: int) -> list[Tensor]:
        if optimizer_index in self._learner.quasi_newton:
            self._measured[optimizer_index] = self._measured.get(optimizer_index, 0) + 1
        return partial_norms(self._gradients(optimizer_index))

    def _pend(self, step: int, optimizer_index: int, norms: list[Tensor]) -> PendingReading | None:
        scale = self.loss_scale()
        return pend(
            step=step,
            optimizer_index=optimizer_index,
            losses=self.losses,
            loss_factor=self._among / len(self.losses) if self.losses else 1.0,
            norms=norms,
            loss_scale=scale,
            gradients_scaled=scale is not None and unscales_itself(self._learner.optimizers[optimizer_index]),
        )

    def _confirm(self, optimizer_index: int) -> float | None:
        values = self._gradients(optimizer_index)
        return None if suspects(values) else exact_norm(values)

    def norm(self, optimizer_index: int) -> float:
        """Norm of the gradients at hand, in this process."""
        values = self._gradients(optimizer_index)
        return float(total_norm(partial_norms(values))) if values else 0.0

    def bad_gradient(self, optimizer_index: int) -> str | None:
        """The first gradient at hand that is not finite, in words."""
        named = self._learner.named_gradients(optimizer_index)
        bad = suspects(plain([gradient for _, gradient in named]))
        return f"gradient of {named[bad[0]][0]}" if bad else None

    def loss_scale(self) -> Tensor | None:
        """What the GradScaler multiplies losses by; ``None`` without one."""
        # The tensor itself: get_scale() reads from the device.
        return None if self._learner.scaler is None else getattr(self._learner.scaler, "_scale", None)

    def tries(self, optimizer_index: int) -> bool:
        """Whether what was measured last is of a further closure of the same step, which only tries a place out."""
        return self._measured.get(optimizer_index, 1) > 1

    def end_batch(self) -> None:
        """Closures are counted anew."""
        self._measured.clear()

    def _gradients(self, optimizer_index: int) -> list[Tensor]:
        return plain(self._learner.gradients(optimizer_index))
