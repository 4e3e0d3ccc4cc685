"""A sink that sends interventions as alerts of Weights & Biases."""

from __future__ import annotations

from types import ModuleType
from typing import Any, final

from lightning_nanguard.errors import optional_module
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.messages import tell
from lightning_nanguard.record.text import in_words
from lightning_nanguard.types import Intervention, Kind


@final
class WandbAlert(Sink):
    """Sends an alert of Weights & Biases for the first intervention of each kind, and for one that stops the run.

    Raises:
        ModuleNotFoundError: If wandb is not installed. The message names the extra.
    """

    def __init__(self) -> None:
        _wandb()
        self._seen: set[Kind] = set()

    def write(self, intervention: Intervention) -> None:
        """Send the intervention, if it is the first of its kind.

        Raises:
            RuntimeError: If there is no W&B run.
        """
        stops = intervention.ends_run
        if intervention.kind in self._seen and not stops:
            return
        self._seen.add(intervention.kind)
        wandb: Any = _wandb()
        if wandb.run is None:
            raise RuntimeError("WandbAlert: there is no W&B run to send alerts from. Give the Trainer a WandbLogger.")
        level = wandb.AlertLevel.ERROR if stops else wandb.AlertLevel.WARN
        wandb.run.alert(title=f"NaNGuard: {in_words(intervention.fault)}", text=tell(intervention), level=level)

    def close(self) -> None:
        """Forget which kinds were sent, so that the next fit sends them again."""
        self._seen.clear()


def _wandb() -> ModuleType:
    return optional_module("wandb", "WandbAlert needs wandb", "wandb")
