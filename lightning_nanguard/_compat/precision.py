"""What the trainer's precision plugin keeps."""

from __future__ import annotations

from typing import Any


def grad_scaler(trainer: Any) -> Any:
    """The GradScaler of ``precision="16-mixed"``, ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)
