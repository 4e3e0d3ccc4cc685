"""Describes in words the measurements around an intervention."""

from __future__ import annotations

import math

from lightning_nanguard.report.data import RunData
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import Intervention


def loss_around(intervention: Intervention, data: RunData) -> list[str]:
    """The loss before and after an intervention in words; empty if one of them is not known.

    Args:
        intervention: The intervention.
        data: Its run.
    """
    before, after = data.losses_around(intervention)
    if before is None or after is None:
        return []
    return [f"loss {before:.4g} before, {after:.4g} after (medians of up to {REPORT.rows_around} recorded losses)"]


def recorded_around(intervention: Intervention, data: RunData) -> list[str]:
    """The loss around an intervention, and the layers whose gradient norms changed most before it, one line each.

    Args:
        intervention: The intervention.
        data: Its run.
    """
    lines = loss_around(intervention, data)
    norms = data.norms_at(intervention)
    if norms is not None and len(norms.updates) > 1:
        known = {name: [one for one in values if one is not None] for name, values in norms.layers.items()}
        # What was not finite before says nothing about the change.
        changed = {name: one for name, one in known.items() if len(one) > 1 and math.isfinite(one[0])}
        told = [f"{name} {one[0]:.3g} → {one[-1]:.3g}" for name, one in changed.items()]
        if told:
            more = len(told) - REPORT.layers_in_text
            rest = f", and {more:,} more" if more > 0 else ""
            shown = ", ".join(told[: REPORT.layers_in_text])
            lines.append(f"gradient norms in the last {len(norms.updates)} updates: {shown}{rest}")
    return lines
