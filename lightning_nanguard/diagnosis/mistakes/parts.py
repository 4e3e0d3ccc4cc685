"""Detects parts of the model that are not trained, or are in evaluation mode, although they should be trained."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.diagnosis.mistakes.observation import ModeSeen, Observation, ParameterSeen
from lightning_nanguard.record.text import joined
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def parameter_not_in_optimizer(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts get a gradient in each update and are in no optimizer, so they are never trained.

    A part without a gradient is intended not to learn. A part with weights of an earlier training is no finding either:
    only later layers are trained. A part that changes is trained in another way, such as a copy in half precision.
    """
    if seen.unfreezes:
        return None
    parts = seen.parts(
        lambda one: one.trainable and one.gradient and not (one.optimized or one.moved) and bool(one.untrained)
    )
    what = (
        f"got gradients in the first {seen.updates} updates, but no optimizer has them, so they do not change. Give "
        "their parameters to the optimizer in configure_optimizers, for example by self.parameters(), or set "
        "requires_grad to False if they must not change."
    )
    return _finding("parameter_not_in_optimizer", thresholds.confidence.mistake, parts, what, seen, thresholds)


def detached_part(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts are in an optimizer and get no gradient, because their output is detached before it is used.

    For copies of other parts, and for weights of an earlier training, this is intended.
    """
    parts = seen.parts(lambda one: _gets_no_gradient(one) and one.cut and one.untrained is not False)
    what = (
        f"are in the optimizer but got no gradient in the first {seen.updates} updates: their outputs are detached "
        "from the graph before other parts use them. Look for detach(), .data, item(), numpy() or torch.tensor(…) "
        "after them. If this is intended, leave them out of the optimizer."
    )
    return _finding("detached_part", thresholds.confidence.mistake, parts, what, seen, thresholds)


def parameter_without_gradient(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts run without gradients (``no_grad``), although they are in an optimizer and were never trained.

    This is intended for averages and target networks of other parts, for weights of an earlier training, and for parts
    that change in another way. Parts that do not run at all are no finding.
    """
    if not any(one.gradient for one in seen.parameters):
        return None
    parts = seen.parts(
        lambda one: _gets_no_gradient(one) and one.ran and not one.graph and bool(one.untrained) and one.moved is False
    )
    what = (
        f"are in the optimizer but got no gradient in the first {seen.updates} updates: they are run with gradients "
        "switched off, and do not change. Run them outside torch.no_grad() (and inference_mode), or leave them out of "
        "the optimizer if they must not change."
    )
    return _finding("parameter_without_gradient", thresholds.confidence.mistake, parts, what, seen, thresholds)


def frozen_part(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Parts require no gradient and look untrained.

    These frozen parts are intended: one with weights of an earlier training, one in an optimizer (it will be unfrozen),
    a copy of another part, and one in which other layers are trained (adapters).
    """
    trained = [one.name for one in seen.parameters if one.trained]
    if seen.unfreezes or not trained:
        return None
    frozen = seen.parts(
        lambda one: not (one.trainable or one.optimized or one.copy or one.moved) and one.ran and bool(one.untrained)
    )
    parts = [part for part in frozen if not _among(part, trained)]
    what = (
        "are frozen (requires_grad is False), and their weights look as they were initialised. Load the trained "
        "weights before you freeze them, or do not freeze them. If random features are intended, ignore this."
    )
    return _finding("frozen_part", thresholds.confidence.mistake_guess, parts, what, seen, thresholds)


def _gets_no_gradient(one: ParameterSeen) -> bool:
    """Whether an optimizer has a parameter that never got a gradient and copies no trained one."""
    return one.trainable and one.optimized and not one.gradient and not one.copy


def _among(part: str, trained: list[str]) -> bool:
    """Whether other parameters of the same part of the model are trained."""
    around = part.rpartition(".")[0]
    return bool(around) and any(name.startswith(f"{around}.") for name in trained)


def _finding(
    cause: str,
    confidence: float,
    parts: Sequence[str],
    what: str,
    seen: Observation,
    thresholds: DiagnosisThresholds,
) -> Finding | None:
    """A finding about parts of the model; ``None`` without any."""
    if not parts:
        return None
    place = joined(parts, thresholds.mistakes.named_parts)
    return seen.finding(cause, confidence, place, f"{place} {what}", parts=len(parts))


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
