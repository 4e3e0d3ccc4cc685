"""Rules for causes that come back each time an update is made again from the good state."""

from __future__ import annotations

from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding


def optimizer_update(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Loss, gradient and state are finite, and the optimizer's step gives a weight or a moment that is not."""
    cure = (
        "Look at what its step divides by: an eps that is 0 or too small for this dtype, the norm of an update that "
        "is zero, a second moment that has decayed to zero. Raise eps, keep the weights in float32, or use another "
        "optimizer."
    )
    what = "loss and gradient were finite, and the optimizer's step caused this each time the update was made"
    return _comes_back(case, thresholds, "optimizer_update", what, cure)


def forward_writes_buffer(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The loss is finite, and the forward pass writes a number that is not finite into a buffer."""
    if case.evidence.growth > thresholds.learner.ruined:
        return None  # below weights of this size any number overflows
    cure = (
        "Look at what the forward pass writes there: a division by a count or a sum that may be zero, the variance of "
        "one value, the square of an input that is far too large."
    )
    what = "the loss was finite, and the forward pass caused this each time it was run"
    return _comes_back(case, thresholds, "forward_writes_buffer", what, cure)


def _comes_back(case: Case, thresholds: DiagnosisThresholds, cause: str, what: str, cure: str) -> Finding | None:
    known, place = case.evidence.redo_cause
    confidence = thresholds.confidence.update_again
    tensor = case.evidence.corrupt or (case.fault.place if case.fault.conclusive else None)
    if not known and tensor is not None:
        # The batch is skipped, or updates cannot be made again: use the earlier finding about this tensor.
        places = [one.finding.place for one in case.earlier if one.finding.cause == cause]
        place = next((one for one in reversed(places) if tensor in one), "")
        known, confidence = cause if place else "", thresholds.confidence.update_before
    if known != cause:
        return None
    suggestion, times = f"{place} is no longer finite: {what}. {cure}", float(case.times(cause, place))
    return Finding(cause, confidence, {"times": times}, place, suggestion=suggestion, scope="state")
