"""Rules for state that became bad, by itself or each time an update is made again: a weight, a buffer or a moment."""

from __future__ import annotations

from lightning_nanguard.decide.blame import learner_did_it, made_worse
from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.record.text import counted
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, LearnerThresholds
from lightning_nanguard.types import Evidence, Finding


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


_BY_ITSELF = "became bad, and was good when the updates since the last good state were made again"


def corrupted_state(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Weights, buffers or moments became bad, but no batch was bad. With the good state the fault is gone."""
    fault, evidence, change, known = case.fault, case.evidence, case.clues.change, thresholds.confidence
    if evidence.redone:
        return _corrupted(case, thresholds, known.transient, evidence.corrupt or fault.place, _BY_ITSELF)
    trained = not _is_untrained(evidence, evidence.corrupt or fault.place)  # a rate changes nothing else
    if evidence.undo or (trained and (evidence.climbing or evidence.rate_rose)) or evidence.redo_cause[0]:
        return None
    if fault.rate_may_cause:
        if updates_enlarged_it(case, thresholds.learner) or made_worse(evidence):
            return None
        # Running statistics also jump if a batch far out of range passes a normalisation layer.
        return _corrupted(case, thresholds, known.state_implausible, fault.place, "became far larger than before")
    if evidence.corrupt is not None:
        if fault.scope == "learner" and fault.certain:
            return None
        return _corrupted(case, thresholds, known.state_non_finite, evidence.corrupt, "is no longer finite")
    if case.clues.spoilt_buffers:
        name = f"buffer {case.clues.spoilt_buffers[0]}"
        return _corrupted(case, thresholds, known.state_non_finite, name, "is no longer finite")
    if fault.scope == "state" and fault.conclusive:
        return _corrupted(case, thresholds, known.state_implausible, fault.place, "is far too large")
    if change is not None and case.clues.good_finite is not False and not _bad_there_too(case, thresholds.blame):
        moved = (
            f"has an element that went from {change.before:.4g} to {change.now:.4g}, while the others moved by "
            f"at most {change.usual:.2g}"
        )
        numbers = {"before": change.before, "now": change.now, "usual": change.usual}
        return _corrupted(case, thresholds, known.state_element, change.name, moved, **numbers)
    if evidence.jump is None or fault.scope == "learner" or learner_did_it(evidence, thresholds.blame):
        return None
    larger = "is far larger than any weight of the last good state"
    return _corrupted(case, thresholds, known.state_jump, evidence.jump, larger)


def _is_untrained(evidence: Evidence, name: str) -> bool:
    """Whether a bad parameter is one that no optimizer trains."""
    return evidence.alone == "averages" and name.startswith("parameter")


def updates_enlarged_it(case: Case, limits: LearnerThresholds) -> bool:
    """Whether an implausible weight grew as a whole. Memory corruption enlarges only a few elements."""
    grew = case.fault.rate_may_cause and case.evidence.growth > limits.ruined
    weight = case.evidence.jump or case.fault.place  # which explains a buffer that is too large
    return grew and weight.startswith("parameter") and case.clues.moved_alone is False


def _bad_there_too(case: Case, limits: BlameThresholds) -> bool:
    loss, unit = case.clues.good_loss, case.evidence.loss_unit
    return loss is not None and loss > case.evidence.first + limits.sane_loss * unit


def _corrupted(
    case: Case, thresholds: DiagnosisThresholds, confidence: float, name: str, what: str, **numbers: float
) -> Finding:
    weight = case.evidence.jump
    if weight is not None and name.startswith("buffer "):
        # A weight far out of proportion makes the statistics of later layers bad, and these are often seen first.
        name, what = weight, f"is far larger than any weight of the last good state, and {name} {what}"
    times = case.times("corrupted_state", name)
    return Finding(
        "corrupted_state",
        confidence,
        evidence={"tensor": name, "times": float(times), **numbers},
        place=name,
        suggestion=f"{name} {what}, {_where_to_look(case, name, times, thresholds.blame)}",
        scope="state",
    )


def _where_to_look(case: Case, name: str, times: int, limits: BlameThresholds) -> str:
    """What may have made a tensor bad, for the ``times``-th time, and what the user can do."""
    evidence, since = case.evidence, case.evidence.healthy_since_restore
    # A memory fault is gone with the good state, and does not come back soon after a restore.
    gone = case.clues.change is None or case.clues.good_finite is True
    again = f"for the {_ordinal(times)} time, " if times > 1 and gone else ""
    seen = evidence.corrupt or case.fault.place
    it = name if seen.startswith("buffer ") and name != seen else "it"
    look = f"Look for code that writes to {it}: a hook, a callback, an in-place operation."
    memory = (
        f"{again}although no earlier reading was bad and the restored state was good: a memory fault, or code that "
        f"writes to {it}. Test the device."
    )
    if _is_untrained(evidence, name):
        return "and no optimizer trains it. Look at the code that writes to it: an average needs a decay below 1."
    if evidence.redone:
        return memory if again else f"so no batch and no rate caused it. {look}"
    if evidence.told:
        return f"and {evidence.told}."
    if case.fault.rate_may_cause and name.startswith("buffer"):
        return (
            "although no loss or gradient was bad. Look for a batch with numbers far out of range: normalisation hides "
            "them from the loss. If there is none, look for code that writes to it."
        )
    if not again:
        return (
            f"although no {'earlier reading' if since is None else 'reading since the last rollback'} was bad. {look}"
        )
    if since is not None and since < limits.calm_when_late:
        return (
            f"again {counted(since, 'update') if since else 'at once'} after a rollback. Look for code that writes to "
            "it: a callback, a hook, the forward pass or the optimizer."
        )
    return memory


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
