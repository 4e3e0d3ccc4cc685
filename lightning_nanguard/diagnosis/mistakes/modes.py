"""Detects parts of the model that are in evaluation mode while the model is trained."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import ModeSeen, Observation
from lightning_nanguard.record.text import joined
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def dropout_off(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Dropout layers with a rate above zero are in evaluation mode, and the modules around them are not."""
    if seen.evaluating or not any(one.trained for one in seen.parameters):
        return None
    off = [one for one in seen.modes if one.drops and not one.training and one.within == one.path]
    if not off:
        return None
    layers = joined([one.path for one in off], thresholds.mistakes.named_parts)
    return seen.finding(
        "dropout_off",
        thresholds.confidence.mistake,
        place=layers,
        modules=len(off),
        suggestion=(
            f"{layers} ({off[0].kind}) stayed in evaluation mode up to update {seen.updates}, while the model around "
            "was in training mode. Call train() on the module, or set p to 0 if you want no dropout."
        ),
    )


def eval_mode(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """A trained part is in evaluation mode as a whole: dropout is off, and batch norm does not update its statistics.

    For a part that is not trained this is intended. If only the batch norm of a trained part is in evaluation mode, the
    model is fine-tuned, and this is intended, too.
    """
    trained = [one for one in seen.parameters if one.trained]
    stuck = [one for one in seen.modes if not one.training and one.within != one.path]
    if not trained or not stuck:
        return None
    if seen.evaluating:
        place, what = "the module", stuck
    else:
        parts = dict.fromkeys(one.within for one in stuck)
        wrong = [part for part in parts if _learns(part, seen, [one for one in stuck if one.within == part])]
        if not wrong:
            return None
        place = joined(wrong, thresholds.mistakes.named_parts)
        what = [one for one in stuck if one.within in wrong]
    kinds = joined(list(dict.fromkeys(one.kind for one in what)), thresholds.mistakes.named_parts)
    return seen.finding(
        "eval_mode",
        thresholds.confidence.mistake,
        place=place,
        modules=len(what),
        suggestion=(
            f"{place} was in evaluation mode when update {seen.updates} was made, and before it, so that {kinds} did "
            "not work as in training. Call train() before the first batch, and after every call of eval() in your code."
        ),
    )


def _learns(part: str, seen: Observation, modes: list[ModeSeen]) -> bool:
    inside = [one for one in seen.parameters if one.name.startswith(f"{part}.") and one.trained]
    return bool(inside) and (any(one.drops for one in modes) or any(one.untrained for one in inside))
