"""Watches the data before a fit begins, because a loader may draw its first batches before any hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_nanguard.record.known_samples import KnownSamples
from lightning_nanguard.trainer.guard_copies import CopyableGuard
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import Trainer


class DataWatchingGuard(CopyableGuard):
    """The part of :class:`~lightning_nanguard.NaNGuard` that watches the data of a fit."""

    def _watch_data(self, trainer: Trainer) -> DataOrder:
        """From now on, record the rows of each batch."""
        self._leave_data()
        given = self._given or self._arguments
        known = KnownSamples(quarantine=given.quarantine and not given.observe)
        self._order = DataOrder(trainer, known, given.thresholds.samples.batches_waiting)
        return self._order

    def _know_samples(self, state: Mapping[str, Any] | None) -> None:
        """Load the bad samples of the resumed run, before the first batch."""
        if self._order is not None and state is not None:
            self._order.known.load_state_dict(state.get("samples", {}))

    def _leave_data(self) -> None:
        """Remove everything from the loaders."""
        order, self._order = self._order, None
        if order is not None:
            order.close()
