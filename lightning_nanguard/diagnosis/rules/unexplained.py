"""Rules for faults that no operation explains: what is known of them, and what was looked at."""

from __future__ import annotations

import math

from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.rules.signs import in_gradient
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

_WRITERS = "on_after_backward of the module and of callbacks, and hooks of parameters"


def changed_gradient(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Code outside of the operations changed the gradient: when the batch is run again, the operations give a good one.

    A replay computes the gradient with autograd alone. So it runs hooks of tensors, and nothing that comes after them.
    """
    fault, evidence, clues = case.fault, case.evidence, case.clues
    asked = in_gradient(fault) and fault.certain and clues.replayed and clues.origin is None
    if not asked or evidence.corrupt is not None or evidence.undo or evidence.redone:
        return None
    if clues.gradient_finite is False:
        what = "no operation of the backward pass made the gradient not finite, and a replay shows the same"
        return _changed(case, thresholds, f"{what}. Look at hooks of tensors (register_hook).")
    norm, found = clues.norm, math.inf if fault.value is None or math.isnan(fault.value) else fault.value
    if not clues.gradient_finite or norm is None or not norm < found / thresholds.learner.spike_factor:
        return None
    text = (
        f"the loss and its gradient are finite when the batch is run again (norm {norm:.4g}), so code that runs after "
        f"the backward pass changed the gradient. Look at {_WRITERS}."
    )
    return _changed(case, thresholds, text, norm)


def _changed(case: Case, thresholds: DiagnosisThresholds, text: str, norm: float | None = None) -> Finding:
    numbers = {} if norm is None else {"gradient_norm": norm}
    sure = thresholds.confidence.changed_gradient
    return Finding("changed_gradient", sure, numbers, case.fault.place, suggestion=text)


def unexplained(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """A loss or gradient that is not finite, and was not run again: it says what was looked at and is finite."""
    fault, evidence, clues = case.fault, case.evidence, case.clues
    if fault.scope != "batch" or not fault.clipping_helps or not fault.certain or fault.conclusive:
        return None
    shown = evidence.redone or evidence.redo_failed or evidence.redo_cause[0] or evidence.corrupt is not None
    if shown or evidence.batch_finite is False or (clues.replayed and not (evidence.undo and clues.gradient_finite)):
        return None
    what = "the gradient" if in_gradient(fault) else "the loss"
    seen = [*(["the batch"] if evidence.batch_finite else []), *([] if evidence.undo else ["weights and buffers"])]
    known = f"no NaN or Inf was found in {' or in '.join(seen)}, and " if seen else ""
    if clues.replayed:
        text = f"{known}{what} of this batch is finite under the last good weights"
    else:
        text = f"{known}the batch was not run again, so the operation is not known"
    if in_gradient(fault):
        look = (
            f"The loss is finite. So look at code that runs after the backward pass (clipping, {_WRITERS}), and at "
            "operations whose derivative is not finite (a root or a norm of zero, a division by almost zero)"
        )
    else:
        look = (
            "Look at operations that are not defined for every number (a logarithm, a root, a division) or overflow "
            "(an exponential), and at their inputs on this batch"
        )
    return Finding("unexplained", thresholds.confidence.unexplained, {}, fault.place, suggestion=f"{text}. {look}.")
