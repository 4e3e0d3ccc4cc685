"""The GradScaler and the autocast of the trainer's precision plugin."""

from __future__ import annotations

from typing import Any


def grad_scaler(trainer: Any) -> Any:
    """The GradScaler of ``precision="16-mixed"``, ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def autocasts_to_half(trainer: Any) -> bool:
    """Whether ``training_step`` runs under autocast to float16."""
    plugin = trainer.precision_plugin
    return getattr(plugin, "precision", "") == "16-mixed" and hasattr(plugin, "autocast_context_manager")
