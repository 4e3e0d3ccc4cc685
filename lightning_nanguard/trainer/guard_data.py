"""What a guard knows of the data before its fit begins: a loader may draw its first batches before any hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_nanguard.record.known_samples import KnownSamples
from lightning_nanguard.trainer.guard_copies import CopyableGuard
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import Trainer


class DataWatchingGuard(CopyableGuard):
    """What :class:`~lightning_nanguard.NaNGuard` does with the data of a fit."""

    def _watch_data(self, trainer: Trainer) -> DataOrder:
        """Learn from now on which rows each batch holds."""
        self._leave_data()
        given = self._given or self._arguments
        known = KnownSamples(quarantine=given.quarantine and not given.observe)
        self._order = DataOrder(trainer, known, given.thresholds.samples.batches_waiting)
        return self._order

    def _know_samples(self, state: Mapping[str, Any] | None) -> None:
        """Load what the resumed run knew about its samples, before the first batch."""
        if self._order is not None and state is not None:
            self._order.known.load_state_dict(state.get("samples", {}))

    def _leave_data(self) -> None:
        """Remove everything from the loaders."""
        order, self._order = self._order, None
        if order is not None:
            order.close()
