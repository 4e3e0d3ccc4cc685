"""The losses and gradients of the present update, measured without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import final

from torch import Tensor

from lightning_nanguard.act.skip import unscales_itself
from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.measure.norm_history import NormHistory
from lightning_nanguard.measure.norms import exact_norm, partial_norms, total_norm
from lightning_nanguard.measure.readings import PendingReading, sum_of
from lightning_nanguard.measure.tensors import WIDER, dense_gradients, dense_values, is_on_host
from lightning_nanguard.state.device import OutOfMemory
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.measurement import MeasurementThresholds
from lightning_nanguard.types import Reading

_numel = methodcaller("numel")


@final
@dataclass(frozen=True, slots=True)
class _Early:
    """A reading that was measured before :meth:`Meter.measure_now` was called.

    Attributes:
        step: Number of the update.
        optimizer_index: Index of the optimizer.
        reading: What was read.
        losses: The losses that were measured.
        versions: Identity and version of the gradients; ``None`` if no other code changes them before the step.
    """

    step: int
    optimizer_index: int
    reading: Reading | None
    losses: list[Tensor]
    versions: list[tuple[int, int]] | None


@final
class Meter:
    """Measures loss and gradient of the update that is about to be made.

    Args:
        learner: The learner of the run.
        micro_batches: Gives the number of micro-batches by which a loss is divided.
        many_losses: Whether an update may have several losses even if ``micro_batches`` gives 1, as under manual
            optimization.
        thresholds: How gradient norms are measured.
        history: Keeps the norms of the newest updates.
    """

    def __init__(
        self,
        learner: Learner,
        micro_batches: Callable[[], int],
        *,
        many_losses: bool = False,
        thresholds: MeasurementThresholds | None = None,
        history: NormHistory | None = None,
    ) -> None:
        self._learner = learner
        self._micro_batches = micro_batches
        self._many_losses = many_losses
        self._thresholds = MeasurementThresholds() if thresholds is None else thresholds
        self._history = NormHistory(self._thresholds) if history is None else history
        # Number of measurements in this batch, for each optimizer that runs its closure several times in a step.
        self._closures: dict[int, int] = {}
        # Numbers of elements that the gradients of an optimizer had.
        self._sizes: dict[int, set[int]] = {}
        self.has_new_size = False
        """Whether the gradients measured last have a number of elements that none before had."""
        self._divided_by = 1
        self._losses: list[Tensor] = []
        self._early: _Early | None = None

    def see_loss(self, loss: Tensor) -> None:
        """Keep a reference to the loss of one backward pass."""
        self._divided_by = self._micro_batches()
        loss = _number(loss.detach())
        # A captured CUDA graph writes the next loss to the same memory.
        self._losses.append(loss.clone() if self._many_losses or self._divided_by > 1 else loss)

    def forget_sizes(self) -> None:
        """Forget the known numbers of elements, because a layer has changed its size."""
        self._sizes.clear()

    def bad_loss(self, *, wait: bool = True) -> float | None:
        """The first of the losses seen that is not finite; ``None`` without one.

        Args:
            wait: Whether to read losses for which the host has to wait, too.
        """
        values = (float(one) for one in self._losses if not one.is_complex() and (wait or is_on_host(one)))
        return next((one for one in values if not math.isfinite(one)), None)

    def drop_losses(self) -> None:
        """Forget the losses that were seen, because no update is made from them."""
        self._losses = []
        self._early = None

    def drop_last_loss(self) -> None:
        """Forget the loss that was seen last."""
        del self._losses[-1:]

    def measure_early(self, step: int, optimizer_index: int, *, careful: bool) -> Reading | None:
        """The reading that :meth:`measure_now` will give for this update, before a GradScaler unscales the gradients.

        Args:
            step: Number of the update.
            optimizer_index: Index of the optimizer.
            careful: Whether other code may change the gradients before :meth:`measure_now`. It then measures again.
        """
        losses = self._losses
        reading = self._measure(step, optimizer_index, scaled=True)
        versions = self._versions(optimizer_index) if careful else None
        self._early = _Early(step, optimizer_index, reading, losses, versions)
        return reading

    def drop_early(self) -> None:
        """Forget the early measurement, because the closure runs again."""
        early, self._early = self._early, None
        if early is not None and early.optimizer_index in self._closures:
            self._closures[early.optimizer_index] -= 1

    def _take_early(self, step: int, optimizer_index: int) -> _Early | None:
        early, self._early = self._early, None
        if early is None or (early.step, early.optimizer_index) != (step, optimizer_index):
            return None
        if early.versions is None or early.versions == self._versions(optimizer_index):
            return early
        self._losses = early.losses
        return None

    def _versions(self, optimizer_index: int) -> list[tuple[int, int]]:
        return [(id(one), one._version) for one in self._learner.gradients(optimizer_index)]

    def measure_later(self, step: int, optimizer_index: int) -> PendingReading | None:
        """Loss and gradient of update ``step``, still on the device; ``None`` if there is neither."""
        return self._pending(step, optimizer_index, self._partial_norms(step, optimizer_index), self._take_losses())

    def measure_now(self, step: int, optimizer_index: int) -> Reading | None:
        """Loss and gradient of update ``step``; waits for the device. ``None`` if there is neither."""
        early = self._take_early(step, optimizer_index)
        return self._measure(step, optimizer_index) if early is None else early.reading

    def _measure(self, step: int, optimizer_index: int, *, scaled: bool = False) -> Reading | None:
        norms, losses = self._partial_norms(step, optimizer_index), self._take_losses()
        # A fast path for finite numbers on the host. Most updates on a CPU take it.
        if losses and norms and self._learner.scaler is None and all(map(is_on_host, (*losses, *norms))):
            norm, loss = math.hypot(*map(float, norms)), sum(map(float, losses)) * self._divided_by / len(losses)
            if math.isfinite(norm) and math.isfinite(loss):
                return Reading(step, optimizer_index, loss, norm)
        pending = self._pending(step, optimizer_index, norms, losses, scaled=scaled)
        return None if pending is None else pending.read(partial(self._exact_norm, optimizer_index))

    def gradient_norm(self, optimizer_index: int) -> float:
        """Norm of the present gradients, in this process."""
        values = self._gradients(optimizer_index)
        return float(total_norm(partial_norms(values, self._thresholds))) if values else 0.0

    def first_bad_gradient(self, optimizer_index: int) -> str | None:
        """The first of the present gradients that is not finite, in words; ``None`` if all are finite."""
        named = self._learner.named_gradients(optimizer_index)
        bad = non_finite_indices(dense_gradients([gradient for _, gradient in named]))
        return f"gradient of {named[bad[0]][0]}" if bad else None

    def loss_scale(self) -> Tensor | None:
        """The factor by which the GradScaler multiplies losses; ``None`` without a GradScaler."""
        # The tensor itself: get_scale() reads from the device.
        return None if self._learner.scaler is None else getattr(self._learner.scaler, "_scale", None)

    def is_line_search(self, optimizer_index: int) -> bool:
        """Whether the last measurement belongs to a further closure of one step, as in the line search of LBFGS."""
        return self._closures.get(optimizer_index, 1) > 1

    def end_batch(self) -> None:
        """Reset the counts of closures at the end of the batch."""
        self._closures.clear()

    def _partial_norms(self, step: int, optimizer_index: int) -> list[Tensor]:
        if optimizer_index in self._learner.quasi_newton:
            self._closures[optimizer_index] = self._closures.get(optimizer_index, 0) + 1
        gradients = self._learner.gradients(optimizer_index)
        known, elements = self._sizes.setdefault(optimizer_index, set()), sum(map(_numel, gradients))
        self.has_new_size = elements not in known
        known.add(elements)
        try:
            values = dense_gradients(gradients)
            norms = partial_norms(values, self._thresholds)
        except (NotImplementedError, TypeError, RuntimeError) as error:
            if isinstance(error, OutOfMemory):
                raise
            # Some gradients are of an unusual kind. To check for these in every step would cost more than the norms.
            values = [one for gradient in gradients if (one := dense_values(gradient)).numel()]
            norms = partial_norms(values, self._thresholds)
        named = self._learner.which_have_gradients(optimizer_index, len(values))
        self._history.keep(step, optimizer_index, norms, named)
        return norms

    def _take_losses(self) -> list[Tensor]:
        losses, self._losses = self._losses, []
        return losses

    def _pending(
        self, step: int, optimizer_index: int, norms: list[Tensor], losses: list[Tensor], *, scaled: bool = False
    ) -> PendingReading | None:
        if not losses and not norms:
            return None
        scale = self.loss_scale()
        factor = self._divided_by / len(losses) if losses else 1.0
        scaled = scale is not None and (scaled or unscales_itself(self._learner.optimizers[optimizer_index]))
        return PendingReading(step, optimizer_index, sum_of(losses), norms, scale, factor, scaled)

    def _exact_norm(self, optimizer_index: int) -> float | None:
        values = self._gradients(optimizer_index)
        return None if non_finite_indices(values) else exact_norm(values)

    def _gradients(self, optimizer_index: int) -> list[Tensor]:
        return dense_gradients(self._learner.gradients(optimizer_index))


def _number(loss: Tensor) -> Tensor:
    """Reduce a loss to one number: under manual optimization it may have several elements."""
    if loss.numel() == 1 and not loss.is_complex():
        return loss
    values = dense_values(loss)
    return values.mean(dtype=WIDER.get(values.dtype)) if values.numel() else values.new_zeros(())
