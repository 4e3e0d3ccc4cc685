"""Readings of the updates at hand: losses and gradients of the learner, measured without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor
from torch.optim import LBFGS

from lightning_nanguard.blocking import unscales_itself
from lightning_nanguard.events import Reading
from lightning_nanguard.learner import Learner
from lightning_nanguard.measure import PendingReading, exact_norm, gradients, partial_norms, pend, suspects, total_norm


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
        self.losses: list[Tensor] = []

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one backward, as it is given to it."""
        loss = loss.detach()
        # A captured graph writes the next micro-batch's loss to the same place.
        self.losses.append(loss.clone() if self._micro_batches() > 1 else loss)

    def measure(self, step: int, stream: int) -> PendingReading | None:
        """Loss and gradient of update ``step``, on their way; ``None`` where there is neither."""
        self._measured[stream] = self._measured.get(stream, 0) + 1
        return pend(
            step=step,
            stream=stream,
            losses=self.losses,
            loss_factor=self._micro_batches() / len(self.losses) if self.losses else 1.0,
            values=gradients(self._parameters(stream)),
            loss_scale=self.loss_scale(),
            gradients_scaled=unscales_itself(self._learner.optimizers[stream]),
        )

    def read(self, pending: PendingReading) -> Reading:
        """Wait for a reading of the gradients at hand."""
        return pending.read(lambda: self._confirm(pending.stream))

    def _confirm(self, stream: int) -> float | None:
        values = gradients(self._parameters(stream))
        return None if suspects(values) else exact_norm(values)

    def norm(self, stream: int) -> float:
        """Norm of the gradients at hand, in this process."""
        values = gradients(self._parameters(stream))
        return float(total_norm(partial_norms(values))) if values else 0.0

    def bad_gradient(self, stream: int) -> str | None:
        """The first gradient at hand that is not finite, in words."""
        names = self._learner.parameter_names()
        parameters = [parameter for parameter in self._parameters(stream) if parameter.grad is not None]
        bad = suspects(gradients(parameters))
        return f"gradient of {names.get(id(parameters[bad[0]]), 'a parameter')}" if bad else None

    def loss_scale(self) -> Tensor | None:
        """What the GradScaler multiplies losses by; ``None`` without one."""
        # The tensor itself: get_scale() reads from the device.
        return None if self._learner.scaler is None else getattr(self._learner.scaler, "_scale", None)

    def closures(self, stream: int) -> int:
        """How often the step at hand of an optimizer was measured: LBFGS runs its closure several times."""
        return self._measured[stream] if isinstance(self._learner.optimizers[stream], LBFGS) else 1

    def end_batch(self) -> None:
        """Closures are counted anew."""
        self._measured.clear()

    def _parameters(self, stream: int) -> list[Tensor]:
        return [p for group in self._learner.optimizers[stream].param_groups for p in group["params"]]
