"""Keeps running means and metrics correct when updates are repeated, so that no batch counts twice."""

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
    """Stores metrics and running means, and replaces them with the values from repeated updates.

    A value is replaced only if it has as many updates as in the run. Otherwise code that is not repeated, such as a
    validation, has reset or updated it.
    """

    def __init__(self, trainer: Any, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module

    def now(self) -> list[tuple[Metric, dict[str, Any]]]:
        """The present state of all of them."""
        counted = [one for one in self._module.modules() if isinstance(one, Metric) and is_undone(one)]
        return [(one, _held(one)) for one in (*counted, *running_means(self._trainer))]

    @staticmethod
    def put(measures: Sequence[tuple[Metric, dict[str, Any]]]) -> None:
        """Restore the state that :meth:`now` returned."""
        for metric, held in measures:
            for name, value in held.items():
                setattr(metric, name, _copied(value))

    def take(self, repeated: Sequence[tuple[Metric, dict[str, Any]]]) -> None:
        """Use the values after repeated updates.

        Args:
            repeated: The result of :meth:`now` after the last repeated update.
        """
        self.put([(metric, held) for metric, held in repeated if held["_update_count"] == metric._update_count])


def _held(metric: Metric) -> dict[str, Any]:
    names = {*metric._defaults, *FIELDS, "_computed"} & vars(metric).keys()
    return {name: _copied(getattr(metric, name)) for name in names}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
