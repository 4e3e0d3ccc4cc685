"""The state of a guard that is kept from fit to fit and in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.guard_data import DataWatchingGuard
from lightning_nanguard.trainer.never_called import hooks_called

_logger = logging.getLogger("lightning_nanguard")

STATE_SCHEMA = 1
"""Version of what :meth:`StatefulGuard.state_dict` gives; raised when an entry changes its meaning."""


class StatefulGuard(DataWatchingGuard):
    """The part of :class:`~lightning_nanguard.NaNGuard` that saves its state for checkpoints and later fits."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        self._resumed: Mapping[str, Any] | None = None
        self._loaded: Mapping[str, Any] = {}
        self._resumed_run: str | None = None
        self._run_id: str | None = None
        self._multiplier = 1.0

    @property
    def run_id(self) -> str | None:
        """Id of the run, which is in its records and checkpoints; ``None`` before the first fit."""
        return self._memory.run.get("id")

    @property
    def lr_multiplier(self) -> float:
        """The present factor on the scheduled learning rates."""
        known: float = self._memory.run.get("lr_multiplier", self._multiplier)
        return self._fit.context.rate.ratio() if self._fit is not None else known

    @property
    def non_finite_rate(self) -> float | None:
        """Share of the updates of all ranks whose loss or gradient was not finite; ``None`` before the end of a fit."""
        return self._memory.run.get("non_finite_rate")

    @property
    def clip_val(self) -> float | None:
        """The clipping value that the guard has turned on, ``None`` if it has not."""
        return self._fit.context.clipper.value if self._fit is not None else None

    @property
    def state_key(self) -> str:
        """Name of the guard's state in checkpoints. A Trainer asks for it when it gets the guard."""
        # If the Trainer forks processes for its fit, the hooks are called only in these.
        hooks_called(self)
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Multiplier, clipping, windows, budgets and counts, in plain containers."""
        if self._given is None:
            return dict(self._loaded)  # for a later run with the guard
        state = self._fit.guard.state_dict() if self._fit is not None else dict(self._last_state)
        if not state:
            return {}
        return {"schema": STATE_SCHEMA, "guard": state, "interventions": self._memory.total, "run": self._run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until the fit starts, because optimizers do not exist yet."""
        self._loaded = state_dict
        self._resumed_run = state_dict.get("run")
        schema = state_dict.get("schema", STATE_SCHEMA)
        if schema != STATE_SCHEMA:
            _logger.warning(
                "NaNGuard: the checkpoint holds the guard's state in version %s, and this lightning-nanguard reads "
                "version %s. The run goes on, but the learning-rate multiplier, clipping, budgets and windows start "
                "anew. To keep them, install the version that wrote the checkpoint.",
                schema,
                STATE_SCHEMA,
            )
            return
        self._resumed = state_dict.get("guard")
        self._know_samples(self._resumed)
        self._memory.total = int(state_dict.get("interventions", 0))
