"""Tells the user of numbers that were not finite before the first update, and ends a run that they have lost."""

from __future__ import annotations

import logging
from typing import final

from lightning_nanguard.distributed.ranks import first_over_ranks
from lightning_nanguard.errors import TrainingDivergedError
from lightning_nanguard.guard.batch_undos import BatchUndos
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.state.learner import describe

_logger = logging.getLogger("lightning_nanguard")


@final
class BadStart:
    """Knows which trained parameter was not finite before the first update, until an update proves healthy.

    Args:
        context: Objects and settings that the parts of the guard share.
        undos: Undoes the batch that shows that the run is lost.
    """

    def __init__(self, context: GuardContext, undos: BatchUndos) -> None:
        self._context = context
        self._undos = undos
        self._parameter: str | None = None

    def look(self) -> None:
        """Look at the elements that :class:`FiniteCheck` allows, and tell the user of those that are no masks."""
        context = self._context
        # Frozen parameters may be masks of -inf.
        trained = (key for key, leaf in context.learner.weights() if key[0] == "parameter" and leaf.requires_grad)
        mine = next((describe(key) for key in trained if key in context.finite.allowed), None)
        bad, _ = first_over_ranks(context.ranks, mine)
        if bad is not None:
            _logger.info("NaNGuard: %s holds NaN or Inf before the first update; these elements are not checked.", bad)
            self._parameter = None if context.settings.observe else bad
        statistics = context.learner.statistics([key for key, _ in context.learner.weights()])
        spoilt = next((describe(key) for key in statistics if key in context.finite.allowed), None)
        if spoilt is not None:
            # A training batch is normalised by its own statistics, so its loss does not show bad running statistics.
            _logger.warning(
                "NaNGuard: %s holds NaN or Inf before the first update, so that the module gives NaN in evaluation "
                "mode. Call reset_running_stats() of that layer, or begin with a good checkpoint.",
                spoilt,
            )

    def forget(self) -> None:
        """An update was healthy: training survives these numbers."""
        self._parameter = None

    def stop_if_lost(self, found: FoundFault) -> None:
        """End the run if a fault shows that it cannot survive them. The batch may be bad instead.

        Args:
            found: The first fault of the batch.

        Raises:
            TrainingDivergedError: If the run is lost.
        """
        context = self._context
        if (
            self._parameter is None
            or found.reading.finite
            or False in context.ranks.gather(context.replay.batch_finite())
        ):
            return
        self._undos.undo()
        raise TrainingDivergedError(
            f"{self._parameter} holds NaN or Inf before the first update, so there is no good state to go back to. "
            "Look at how it was initialised, or at the checkpoint it came from, and start again."
        )
