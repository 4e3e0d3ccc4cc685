"""Decides which updates are read before they are made although readback is deferred."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, final

from lightning_nanguard.act.skip import StepSkipper
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.guard.found import FoundFault

_logger = logging.getLogger("lightning_nanguard")


@final
class Caution:
    """Decides for each update in deferred readback whether its reading may arrive after the update is made.

    After an update had to be undone, the next 1000 updates are read before they are made. Each time this happens
    again, the number doubles. After a batch made a buffer bad, every update is read before it is made.

    Args:
        context: Objects and settings that the parts of the guard share.
        skipper: Knows which optimizers cannot skip on the device.
    """

    def __init__(self, context: GuardContext, skipper: StepSkipper) -> None:
        self._context = context
        self._careful = context.thresholds.decision.careful
        self._skipper = skipper
        self._never_late = not context.settings.deferred
        self._undone = 0
        self._careful_until = 0

    def may_be_late(self, optimizer_index: int) -> bool:
        """Whether the next update of an optimizer may be made before its reading arrives."""
        if self._never_late or self._context.state.step < self._careful_until:
            return False
        if optimizer_index in self._context.learner.quasi_newton:
            return False  # it measures losses at bad places on purpose, which a late reading does not show
        return self._context.settings.observe or not self._skipper.device_cannot_skip(optimizer_index)

    def update_undone(self, found: FoundFault, *, buffers: bool) -> None:
        """Note that a restore has undone an update.

        Args:
            found: The fault that led to the restore.
            buffers: Whether a batch has made running statistics or another buffer bad.
        """
        context = self._context
        if self._never_late:
            return
        level = logging.DEBUG if context.ranks.rank else logging.WARNING
        # Buffers can be checked only before the update. Not with several ranks, which may see different buffers.
        if buffers and not context.many:
            self._never_late = True
            _logger.log(
                level,
                "NaNGuard: a batch made a buffer bad, and this was noticed only after its update. From now "
                "on the guard reads every update before it is made. Set readback='step' for this from the start.",
            )
        elif found.reached and found.reading.step > self._careful_until:
            updates = self._careful << self._undone
            self._undone += 1
            self._careful_until = context.state.step + updates
            _logger.log(
                level,
                "NaNGuard: a bad update was noticed only after it was made, and had to be undone (%d so far). The "
                "guard reads the next %d updates before they are made. Set readback='step' for this in all updates.",
                self._undone,
                updates,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers."""
        return {
            "undone": self._undone,
            "careful_until": self._careful_until,
            "never_late": self._never_late and self._context.settings.deferred,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; early checkpoints of version 0.1.0 lack these keys."""
        self._undone = int(state.get("undone", 0))
        self._careful_until = int(state.get("careful_until", 0))
        self._never_late |= bool(state.get("never_late", False))
