"""Gives advice about the module's own GradScaler if its scale has collapsed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.amp import GradScaler

from lightning_nanguard.types import Finding


def fallen_scales(module: Any) -> Iterator[Finding]:
    """Findings about each GradScaler among the attributes of a module whose scale is below 1.

    A scaler has to make gradients larger, so a scale below 1 is useless. It skips each step that overflows without
    calling the optimizer, so the guard sees no step.

    Args:
        module: The trained module.
    """
    for name, value in vars(module).copy().items():
        if not isinstance(value, GradScaler) or not value.is_enabled():
            continue
        scale = float(value.get_scale())
        if not scale < 1.0:
            continue
        yield Finding(
            "loss_scale_collapse",
            1.0,
            {"loss_scale": scale},
            f"the GradScaler in {name}",
            suggestion=(
                f"The scale of this GradScaler is {scale:.3g}. It halves its scale, and makes no update, at each step "
                "whose gradients hold Inf or NaN. Look at the losses and gradients of the newest batches. If they are "
                "finite in float32, train with bfloat16 instead of float16."
            ),
        )
