"""Causes of a loss that does not move: how the run has gone, its gradients, and the loss around the weights of now."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from lightning_nanguard.diagnosis.clues import Case, Course
from lightning_nanguard.types import Finding

# Successive gradients of one batch with a cosine below this point back and forth.
_OPPOSED = -0.3
# What the best step along the gradient would bring, relative to the loss, below which the gradient counts as zero.
_NOTHING = 0.02
# A negative eigenvalue is one from the first share of the largest on, and none up to the second; between them it may be
# the noise of the samples. Below the last all is rounding.
_NEGATIVE, _NONE, _ROUNDING = 0.1, 0.01, 1e-7
# Share of its weights that a layer's update makes, and how many times that of the others, where it is abnormal.
_LARGE_UPDATE = 0.05
_APART = 100.0
# Noise of the gradient over its norm in a batch that is too small for it.
_NOISY = 2.0
_SMALL_BATCH = 4
# Samples that a stretch must hold before losses of small batches say that it does not move: fewer are noise themselves.
_SAMPLES = 256
# At a minimum the gradient is noise alone in healthy runs too: over this many batches its mean must stand out by this
# many standard errors, so that there is something that the noise drowns.
_MANY = 32
_CLEAR = 4.0


def oscillation(case: Case) -> Finding | None:
    """The loss is flat because updates jump over the minimum and back: successive gradients are opposed."""
    course = case.course
    if course is None or course.opposed is None or course.opposed > _OPPOSED:
        return None
    # A model that has learned most goes on by little; Adam's updates swing about the valley that they travel along.
    if course.moves or course.rises or (course.falls and not course.high):
        return None
    limit = None if case.curvature is None else case.curvature.largest_rate
    numbers: dict[str, float | str] = {"cosine": course.opposed, "gradient_norm": course.norm}
    rate = ""
    if course.lr is not None:
        numbers["lr"] = course.lr
        rate = f", at learning rate {course.lr:.4g}"
        if limit is not None:
            numbers["largest_rate"] = limit
            rate += f" where this batch's loss stops falling above {limit:.2g}"
    lower = "" if limit is None or course.lr is None or limit > course.lr else f" below {limit:.2g}"
    return Finding(
        "oscillation",
        # Where batches disagree more than they agree each of them points back, and the loss is down in its noise.
        0.87 if course.high and (course.noise is None or course.noise <= 1) else 0.45,
        evidence=numbers,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} while the gradient norm is {course.norm:.3g}; after one update the "
            f"gradient of a batch points back (cosine {course.opposed:.2f}){rate}. Lower the learning rate{lower}, or "
            "use an optimizer that adapts it (Adagrad, RMSprop, Adam)."
        ),
    )


def saddle_point(case: Case) -> Finding | None:
    """The gradient is zero where the loss is flat and high, and bends down in some direction."""
    point = _stationary_point(case)
    if point is None or not point.bends_down:
        return None
    course = point.course
    return Finding(
        "saddle_point",
        0.85,
        evidence=point.evidence,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} with a gradient norm of {course.norm:.2g}, and the smallest Hessian "
            f"eigenvalue is {point.smallest:.3g} (the largest {point.largest:.3g}): a saddle point, with a way "
            "down along that eigenvector. Start from weights that are not all equal or zero, use momentum, or add "
            "noise."
        ),
    )


def local_minimum(case: Case) -> Finding | None:
    """The gradient is zero where the loss is flat and high, and bends up in every direction."""
    point = _stationary_point(case)
    if point is None or not point.bends_up:
        return None
    course = point.course
    return Finding(
        "local_minimum",
        0.65,
        evidence=point.evidence,
        place="loss",
        suggestion=(
            f"the loss stays at {course.now:.4g} (untrained {course.first:.4g}) with a gradient norm of "
            f"{course.norm:.2g}, and no Hessian eigenvalue is clearly negative (smallest {point.smallest:.2g}, "
            f"largest {point.largest:.3g}): a minimum. Restart from other weights, use momentum or a larger rate "
            "for a while, or a model with more capacity; where the data holds nothing more to learn, stop."
        ),
    )


def layer_update_abnormal(case: Case) -> Finding | None:
    """The updates of one layer are out of all proportion to those of the others."""
    layers = [] if case.model is None else [one for one in case.model.layers if one.update is not None and one.weight]
    if len(layers) < 2:
        return None
    worst = max(layers, key=lambda one: one.update or 0.0)
    update = worst.update or 0.0
    others = median(one.update or 0.0 for one in layers if one is not worst)
    if update < _LARGE_UPDATE or update < _APART * others:
        return None
    stands = case.course is not None and not case.course.moves
    confidence = 0.93 if case.fault.scope == "learner" else 0.88 if stands else 0.45
    return Finding(
        "layer_update_abnormal",
        confidence,
        evidence={"update_to_weight": update, "others": others},
        place=worst.path,
        suggestion=(
            f"an update changes {worst.path} by {update:.2g} of its norm, the other layers by {others:.2g} (1e-3 is "
            "usual). Give it a lower learning rate in a parameter group of its own, or initialise it at the scale of "
            "the others."
        ),
    )


def batch_size(case: Case) -> Finding | None:
    """The gradient's noise from batch to batch drowns it."""
    course = case.course
    if course is None or course.moves or not course.high or course.batch_size is None or course.noise is None:
        return None
    if course.batch_size > _SMALL_BATCH or course.noise < _NOISY:
        return None
    certain = course.batches >= _MANY and course.clear > _CLEAR and not _too_few(course)
    return Finding(
        "batch_size",
        0.7 if certain else 0.4,
        evidence={
            "batch_size": float(course.batch_size),
            "noise_over_norm": course.noise,
            "batches": float(course.batches),
            "standard_errors": course.clear,
        },
        place="gradient",
        suggestion=(
            f"with {course.batch_size} sample{'s' if course.batch_size > 1 else ''} in a batch the noise of the "
            f"gradient is {course.noise:.3g} times its mean. Use a larger batch or accumulate_grad_batches, of about "
            f"{_power(course.batch_size * course.noise**2)}, or a lower learning rate."
        ),
    )


def _too_few(course: Course) -> bool:
    size = course.batch_size
    return size is not None and size <= _SMALL_BATCH and size * course.updates < _SAMPLES


def _power(samples: float) -> int:
    size = 1
    while size < samples and size < 1024:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class _Point:
    course: Course
    smallest: float
    largest: float

    @property
    def bends_down(self) -> bool:
        return self.smallest < -max(_NEGATIVE * abs(self.largest), _ROUNDING)

    @property
    def bends_up(self) -> bool:
        return self.largest >= _ROUNDING and self.smallest >= -max(_NONE * abs(self.largest), _ROUNDING)

    @property
    def evidence(self) -> dict[str, float | str]:
        return {"smallest": self.smallest, "largest": self.largest, "gradient_norm": self.course.norm}


def _stationary_point(case: Case) -> _Point | None:
    course, curvature = case.course, case.curvature
    if course is None or course.moves or not course.high or _too_few(course):
        return None
    if curvature is None or curvature.smallest is None or curvature.largest is None:
        return None
    # The step along the gradient that is best by the parabola through it lowers the loss by slope² / 2·bend.
    gain = curvature.slope**2 / (2 * abs(curvature.bend)) if curvature.bend else float("inf")
    if curvature.slope != 0.0 and not gain < _NOTHING * abs(course.now):
        return None
    return _Point(course, curvature.smallest, curvature.largest)
