"""Sets running means and metrics when updates are made again, as if their batches came for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from torchmetrics import Metric

from lightning_nanguard.state.batch_undo import is_undone
from lightning_nanguard.trainer.private.packages import LightningModule
from lightning_nanguard.trainer.private.running_means import FIELDS, running_means


@final
class RepeatedMeasures:
    """Stores metrics and running means, and replaces them by those of repeated updates.

    What repeated updates leave is taken only of those that have seen as many batches as in the run: others were reset
    or updated by code that is not run again, such as a validation.

    Args:
        trainer: The trainer.
        module: Its module.
    """

    def __init__(self, trainer: Any, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module

    def now(self) -> list[tuple[Metric, dict[str, Any]]]:
        """All of them as they are now."""
        counted = [one for one in self._module.modules() if isinstance(one, Metric) and is_undone(one)]
        return [(one, _held(one)) for one in (*counted, *running_means(self._trainer))]

    @staticmethod
    def put(measures: Sequence[tuple[Metric, dict[str, Any]]]) -> None:
        """Restore what :meth:`now` returned."""
        for metric, held in measures:
            for name, value in held.items():
                setattr(metric, name, _copied(value))

    def take(self, repeated: Sequence[tuple[Metric, dict[str, Any]]]) -> None:
        """Use the values after repeated updates.

        Args:
            repeated: What :meth:`now` gave after the last of them.
        """
        self.put([(metric, held) for metric, held in repeated if held["_update_count"] == metric._update_count])


def _held(metric: Metric) -> dict[str, Any]:
    names = {*metric._defaults, *FIELDS, "_computed"} & vars(metric).keys()
    return {name: _copied(getattr(metric, name)) for name in names}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
