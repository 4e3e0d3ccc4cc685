"""Rules for a loss that does not move, from the course of the run, its gradients and the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.course import Course
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, PlateauThresholds
from lightning_nanguard.types import Finding


def oscillation(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """Updates jump over the minimum and back: successive gradients have opposite directions."""
    course, limits, known = case.course, thresholds.plateau, thresholds.confidence
    if course is None or course.opposed is None or course.opposed > limits.opposed:
        return None
    high = course.high(limits)
    # Near the end a model still improves slowly, and Adam's updates oscillate although the loss falls.
    if course.moves(limits) or course.rises(limits) or (course.falls(limits) and not high):
        return None
    numbers: dict[str, float | str] = {"cosine": course.opposed, "gradient_norm": course.norm}
    rate, lower = "", ""
    if course.lr is not None:
        numbers["lr"] = course.lr
        rate = f", at learning rate {course.lr:.4g}"
        limit = None if case.curvature is None else case.curvature.largest_rate
        # If the quadratic model allows a higher rate, it is wrong, because the tried update reversed the gradient.
        if limit is not None and limit / 2 < course.lr:
            numbers["largest_rate"] = limit
            lower = f" to about {limit / 2:.2g}, which lowers this batch's loss most"
    # If the noise exceeds the gradient, each batch's gradient reverses, although only noise is left.
    clear = course.noise is None or course.noise <= limits.oscillation_noise
    return Finding(
        "oscillation",
        known.oscillation if high and clear else known.oscillation_guess,
        evidence=numbers,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} while the gradient norm is {course.norm:.3g}; after one update the "
            f"gradient of the same batch points in the opposite direction (cosine {course.opposed:.2f}){rate}. Lower "
            f"the learning rate{lower}, or use an optimizer that adapts it (Adagrad, RMSprop, Adam)."
        ),
    )


def saddle_point(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The loss is flat and high, its gradient is almost zero, and it falls in some direction."""
    point = _stationary_point(case, thresholds.plateau)
    if point is None or not point.bends_down(thresholds.plateau):
        return None
    course = point.course
    return Finding(
        "saddle_point",
        thresholds.confidence.saddle_point,
        evidence=point.evidence,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} with a gradient norm of {course.norm:.2g}, and the smallest Hessian "
            f"eigenvalue is {point.smallest:.3g} (the largest {point.largest:.3g}): a saddle point, and the loss "
            "falls along that eigenvector. Start from weights that are not all equal or zero, use momentum, or add "
            "noise."
        ),
    )


def local_minimum(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The loss is flat and high, its gradient is almost zero, and it rises in every direction."""
    point = _stationary_point(case, thresholds.plateau)
    if point is None or not point.bends_up(thresholds.plateau):
        return None
    course = point.course
    return Finding(
        "local_minimum",
        thresholds.confidence.local_minimum,
        evidence=point.evidence,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} (untrained {course.first:.4g}) with a gradient norm of "
            f"{course.norm:.2g}, and no Hessian eigenvalue is clearly negative (smallest {point.smallest:.2g}, "
            f"largest {point.largest:.3g}): a minimum. Restart from other weights, use momentum or a larger rate "
            "for a while, or use a model with more capacity. If there is nothing more to learn, stop."
        ),
    )


def layer_update_abnormal(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The updates of one layer are far larger, relative to its weights, than those of the others."""
    # A layer that gets no update is frozen, or is not used in this batch.
    layers = [] if case.model is None else [one for one in case.model.layers if one.update and one.weight]
    if len(layers) < 2:
        return None
    limits, known = thresholds.plateau, thresholds.confidence
    worst = max(layers, key=lambda one: one.update or 0.0)
    update = worst.update or 0.0
    others = median(one.update or 0.0 for one in layers if one is not worst)
    if update < limits.large_update or update < limits.updates_apart * others:
        return None
    stuck = case.course is not None and not case.course.moves(limits)
    alone = known.layer_update_stuck if stuck else known.layer_update_guess
    return Finding(
        "layer_update_abnormal",
        known.layer_update_diverged if case.fault.scope == "learner" else alone,
        evidence={"update_to_weight": update, "others": others},
        place=worst.path,
        suggestion=(
            f"an update changes {worst.path} by {update:.2g} of its norm, the other layers by {others:.2g} (1e-3 is "
            "usual). Give it a lower learning rate in a parameter group of its own, or initialise it at the scale of "
            "the others."
        ),
    )


def batch_size(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The noise of the gradient from batch to batch is larger than the gradient."""
    course, limits, known = case.course, thresholds.plateau, thresholds.confidence
    if course is None or course.moves(limits) or course.batch_size is None or course.noise is None:
        return None
    if course.batch_size > limits.small_batch or course.noise < limits.noisy:
        return None
    # At a minimum the gradient is only noise. If its mean is significant, the loss can fall further.
    proven = course.batches >= limits.min_batches and course.clear > limits.standard_errors
    if not proven and not course.high(limits):
        return None
    suggested = _power_of_two(course.batch_size * course.noise**2, limits.max_batch_size)
    return Finding(
        "batch_size",
        known.batch_size if proven and not _too_few_samples(course, limits) else known.batch_size_guess,
        evidence={
            "batch_size": float(course.batch_size),
            "noise_over_norm": course.noise,
            "batches": float(course.batches),
            "standard_errors": course.clear,
        },
        place="gradient",
        suggestion=(
            f"with {course.batch_size} sample{'s' if course.batch_size > 1 else ''} in a batch the noise of the "
            f"gradient is {course.noise:.3g} times its mean. Use a larger batch (or accumulate_grad_batches) of about "
            f"{suggested} samples, or a lower learning rate."
        ),
    )


def _too_few_samples(course: Course, limits: PlateauThresholds) -> bool:
    size = course.batch_size
    return size is not None and size <= limits.small_batch and size * course.updates < limits.min_samples


def _power_of_two(samples: float, most: int) -> int:
    size = 1
    while size < samples and size < most:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class _StationaryPoint:
    """Weights at which the loss is flat and high, with the ends of the spectrum of its Hessian."""

    course: Course
    smallest: float
    largest: float

    def bends_down(self, limits: PlateauThresholds) -> bool:
        return self.smallest < -max(limits.negative * abs(self.largest), limits.rounding)

    def bends_up(self, limits: PlateauThresholds) -> bool:
        least = -max(limits.not_negative * abs(self.largest), limits.rounding)
        return self.largest >= limits.rounding and self.smallest >= least

    @property
    def evidence(self) -> dict[str, float | str]:
        return {"smallest": self.smallest, "largest": self.largest, "gradient_norm": self.course.norm}


def _stationary_point(case: Case, limits: PlateauThresholds) -> _StationaryPoint | None:
    course, curvature = case.course, case.curvature
    if course is None or course.moves(limits) or not course.high(limits) or _too_few_samples(course, limits):
        return None
    if curvature is None or curvature.smallest is None or curvature.largest is None:
        return None
    # In the quadratic model the best step along the gradient lowers the loss by slope² / (2·bend).
    gain = curvature.slope**2 / (2 * abs(curvature.bend)) if curvature.bend else float("inf")
    if curvature.slope != 0.0 and not gain < limits.no_gradient * abs(course.now):
        return None
    return _StationaryPoint(course, curvature.smallest, curvature.largest)
