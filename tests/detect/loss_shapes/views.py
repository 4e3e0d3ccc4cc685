"""Views of loss histories."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard import Window
from lightning_nanguard.detect.loss_shapes.view import LossView, loss_unit


def view(losses: Sequence[float], *, first: float = 2.0, best: float | None = None, **more: float) -> LossView:
    """The view at the last of some losses, all others of which were accepted; as of a run that never learned."""
    accepted = Window(200)
    for step, loss in enumerate(losses[:-1]):
        accepted.append(step, loss)
    known = {"highest": max(losses), "since": len(losses) - 1, "factor": 10.0, "patience": 40, **more}
    return LossView(losses[-1], accepted, first, loss_unit(first), first if best is None else best, **known)  # type: ignore[arg-type]
