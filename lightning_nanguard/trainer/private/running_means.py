"""Saves the running means of ``self.log(on_epoch=True)`` before a batch, and restores them after a bad one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch

FIELDS = frozenset({"value", "cumulated_batch_size", "_update_count", "has_reset", "_forward_cache"})


def remember_running_means(trainer: Any) -> Callable[[], None]:
    """Save the values that were logged so far in this epoch.

    Returns:
        A function that restores them. Values are updated out of place, so references are enough. A logged torchmetrics
        object is not restored here.
    """
    # The same as Trainer._results in training, but faster, because this runs before every batch.
    results = trainer.fit_loop.epoch_loop._results
    saved = {key: vars(item).copy() for key, item in results.items()}

    def undo() -> None:
        for key, item in results.items():
            before = saved.get(key)
            if before is None:
                if getattr(item, "is_tensor", True):
                    item.reset()
                    item._forward_cache = None
            else:
                vars(item).update({name: before[name] for name in FIELDS & before.keys()})
            item._computed = None

    return undo


@final
class KeptNames:
    """Lets logged values be NaN, and not missing, if every batch that would have given them was skipped.

    A callback or a scheduler that monitors a value raises an exception if its name is missing. Loggers do not get it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._skipped = False
        self._kept: dict[str, torch.Tensor] = {}

    def after_skip(self) -> None:
        """After a skipped batch: keep the names of values of single steps."""
        self._skipped = True
        self._keep(on_step=True)

    def end_epoch(self) -> None:
        """Before the end of an epoch: keep the names of its means. Before it they are missing in every run."""
        if self._skipped:
            self._keep(on_step=False)
        self._skipped = False

    def is_kept(self, name: str, value: Any) -> bool:
        """Whether a value is NaN only because its batches were skipped."""
        return self._kept.get(name) is value

    def _keep(self, *, on_step: bool) -> None:
        results = self._trainer.fit_loop.epoch_loop._results
        # Not ``callback_metrics``, which would compute the means now.
        known = self._trainer._logger_connector._callback_metrics
        for item in results.values():
            if not (item.has_reset and (item.meta.on_step if on_step else item.meta.on_epoch)):
                continue
            for name in set(results._forked_name(item, on_step)) - known.keys():
                known[name] = self._kept[name] = torch.tensor(torch.nan, device=item.device)


def running_means(trainer: Any) -> list[Any]:
    """The running means of training: Lightning's own metrics, whose state is in :data:`FIELDS`."""
    return list(trainer.fit_loop.epoch_loop._results.values())
