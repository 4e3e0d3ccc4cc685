"""Watches the validation loss of a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.packages import Trainer
from lightning_nanguard.trainer.private.running_means import KeptNames
from lightning_nanguard.types import Fault


@final
class ValidationWatch:
    """Checks on the device whether a validation loss is finite, and reports one that is not.

    Args:
        trainer: The trainer.
        guard: Handles a loss that is not finite.
        replay: Keeps the present batch.
        names: Knows values that are NaN only because their batches were skipped.
    """

    def __init__(self, trainer: Trainer, guard: Guard, replay: TrainerBatchReplay, names: KeptNames) -> None:
        self._trainer = trainer
        self._guard = guard
        self._replay = replay
        self._names = names
        self._bad: Tensor | None = None

    def see(self, outputs: Any) -> None:
        """Check the output of ``validation_step``, without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def judge(self) -> None:
        """At the end of validation: report a loss that was not finite."""
        bad, self._bad = self._bad, None
        seen = "validation loss" if bad is not None and bool(bad) else None
        name = seen or next(self._bad_metrics(losses=bad is None), None)
        if name is None:
            return
        # With observe=True the training loss may be bad, too.
        alone = "" if self._guard.context.settings.observe else " while the training loss is"
        message = f"the {name} is not finite{alone}"
        batch_idx, self._replay.batch_idx = self._replay.batch_idx, -1
        try:
            self._guard.report(Fault("non_finite_validation", "state", name, None, message, only_if_corrupt=True))
        finally:
            self._replay.batch_idx = batch_idx

    def _bad_metrics(self, *, losses: bool) -> Iterator[str]:
        """Logged metrics that are not finite and that a callback or a scheduler monitors.

        Args:
            losses: Whether metrics named as validation losses count, too.
        """
        trainer: Any = self._trainer
        owners = (*trainer.callbacks, *trainer.lr_scheduler_configs)
        followed = {name for owner in owners if isinstance(name := getattr(owner, "monitor", None), str)}
        for key, value in trainer.callback_metrics.items():
            is_loss = losses and "loss" in key and key.startswith("val")
            matters = (is_loss or key in followed) and not self._names.is_kept(key, value)
            if matters and not bool(torch.isfinite(value).all()):
                yield key
