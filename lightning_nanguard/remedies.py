"""Remedies: the user's configuration of what may be done, and the hands that do it.

A remedy proposes one frozen plan step and later carries it out on a small protocol, :class:`Patient`; nothing else
changes the run. A remedy of your own is one class::

    @dataclass(frozen=True)
    class Page(PlanStep):
        text: str

    class PageSomebody(Remedy):
        word, step = "page", Page

        def propose(self, fault, evidence, attempt):
            return Page(fault.message) if attempt >= 3 else None

        def apply(self, step, patient):
            send(step.text)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol, final

from lightning_nanguard.detectors import require
from lightning_nanguard.events import Clip, DropMoments, Fault, PlanStep, Restore, Scale, Skip, Stop
from lightning_nanguard.policy import Evidence


class Patient(Protocol):
    """What a remedy may do to a run."""

    def skip(self) -> None:
        """Undo what the batch touched; the update itself was kept from the weights."""

    def restore(self, depth: int) -> None:
        """Put the learner back to the certified snapshot ``depth`` places behind the newest."""

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        """Multiply the learning rate, or with ``limit`` allow no larger one than results."""

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        """Clip gradients from now on; ``inf`` ends it."""

    def drop_moments(self) -> None:
        """Empty the optimizers' state."""

    def rehearse(self, factor: float, updates: int) -> float | None:
        """Mean loss of the newest batches after ``updates`` on them with the learning rate multiplied by ``factor``.

        In units of the loss's own scale, the untrained model's loss or its noise. Infinite where the loss left on the
        way; the learner is left as it was. ``None`` where that cannot be done.
        """

    def rehearsal_batches(self) -> int:
        """How many batches there are to rehearse on."""


class Remedy(ABC):
    """One thing the guard may do."""

    word: ClassVar[str]
    """How the records call it."""

    step: ClassVar[type[PlanStep]]
    """The kind of plan step it proposes and carries out."""

    @abstractmethod
    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """What to do about this fault, ``None`` when the remedy does not fit. Pure.

        Args:
            fault: What was found.
            evidence: What is known about it.
            attempt: 0 at first, one more each time the trouble came back soon.
        """

    @abstractmethod
    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Carry out a step that this remedy proposed."""


@final
class SkipStep(Remedy):
    """Leave the update out; the batch leaves nothing behind.

    The policy skips single bad batches whether or not this is listed; listing it says so in a configuration.
    """

    word = "skip"
    step = Skip

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Nothing: what a skip can help was skipped before remedies are asked."""
        return None

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Undo what the batch touched."""
        patient.skip()


@final
class Rollback(Remedy):
    """Go back to the last good state in memory; deeper when the trouble comes back soon."""

    word = "restore"
    step = Restore

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A restore, one snapshot deeper for each attempt after the first."""
        return Restore(max(0, attempt - 1))

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Restore the learner."""
        assert isinstance(step, Restore)
        patient.restore(step.depth)


@final
class ReduceLR(Remedy):
    """Cut the learning rate of a diverged learner, more at each attempt, and give it back after a healthy stretch.

    The first cut is ``factor``, the next ``factor ** 2``, ``factor ** 4``, …, at most to a tenth at once. Where the run
    allows it, a rate is rehearsed before it is taken: from the state gone back to, a few updates on the batch at hand
    show at which rate its loss really falls, and the cut goes there at once. It is a multiplier under whatever
    schedule there is.

    Args:
        factor: The first cut.
        min_lr: The rate is never cut below it.
        recover_after: Healthy updates after which a cut is tried back (``1 / factor`` at a time); towards rates that
            were proven it goes faster, across one that failed slower.
        rehearse: Whether to rehearse.

    Raises:
        ValueError: When an argument is out of its range.

    Example:
        >>> ReduceLR(factor=0.5).propose(Fault("exploding_loss", "learner", "loss"), Evidence(step=9), 1).factor
        0.25
    """

    word = "scale"
    step = Scale
    _largest_cut = 0.1
    _largest_blind_cut = 1 / 1024
    _grown = 25.0

    def __init__(
        self, factor: float = 0.5, min_lr: float = 0.0, recover_after: int = 1000, rehearse: bool = True
    ) -> None:
        require(0 < factor < 1, self, "factor", factor, "a number between 0 and 1")
        require(min_lr >= 0 and math.isfinite(min_lr), self, "min_lr", min_lr, "a finite number of at least 0")
        require(recover_after >= 1, self, "recover_after", recover_after, "an integer of at least 1")
        self.factor = factor
        self.min_lr = min_lr
        self.recover_after = recover_after
        self.rehearse = rehearse

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A cut, unless the rate is at its floor."""
        if evidence.lr is not None and evidence.lr <= self.min_lr:
            return None
        smallest = min(self.factor, self._largest_cut)
        factor = max(self.factor**2 ** min(attempt, 10), smallest)
        if not evidence.comparable and evidence.growth > self._grown:
            # Nothing can be rehearsed: how far the weights went is the only measure of the rate.
            factor = min(factor, max(0.5 / evidence.growth, self._largest_blind_cut))
        return Scale(factor, self.min_lr)

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Change the multiplier."""
        assert isinstance(step, Scale)
        rehearses = self.rehearse and step.factor < 1
        if rehearses and step.clipped and not step.firm and clipping_will_do(patient.rehearse, step.factor):
            return
        few = rehearses and patient.rehearsal_batches() <= _FEW
        found = rehearsed_cut(patient.rehearse, step.factor, few=few) if rehearses else None
        if found is None:
            # Nothing was tried: the curvature of one batch at one place is what is known.
            factor = min(step.factor, max(step.most, self._largest_blind_cut))
        else:
            # A rate proven long ago may be too high by now: a rehearsal that says so by far is believed.
            factor = max(found, min(step.least, 4 * found))
            if step.firm:
                factor = min(factor, max(step.most, _LEAST_OF_BEST * factor))
        patient.scale(factor, step.min_lr, limit=step.limit)


# How much of the best gain may be missing, of a gain that is counted up to so many times the loss it ends at: where the
# loss began far off, every rate gains nearly all.
_MISSING = 0.5
_COUNTED = 30.0
# A best loss this near to 0, over its scale, is of batches learned by heart. So have rates that come below the second.
_BY_HEART, _AS_GOOD = 3e-3, 0.05
# The same where the best rate takes the loss below half: what lags behind it there is slow, while before that all are.
_MISSING_OF_MUCH = 0.3
# On so few batches what is learned by heart takes the loss there, and it favours large rates.
_FEW = 2
# A loss higher by this than before, over its scale, is harm; one lower by less is no help behind such a rate.
_WORSE = 0.1
# The rate taken lies between these shares of the best.
_LEAST_OF_BEST = 1 / 16
_MOST_OF_BEST = 1 / 2
# Share of a cut's gain that may be missing without it, where it is not to be made.
_NEARLY = 0.02


def rehearsed_cut(
    rehearse: Callable[[float, int], float | None],
    largest: float,
    *,
    few: bool = False,
    tries: int = 10,
    updates: int = 8,
) -> float | None:
    """The cut at which the loss of the newest batches really falls.

    From ``largest`` down by a factor of four each, until a rate brings clearly less than a larger one did. Rates at the
    edge of stability look best for a few updates and fail later: taken is the lowest in a row below the best that
    brings nearly as much, at most half of the best and at least a sixteenth, or still less where that, too, takes the
    loss to next to nothing.

    Args:
        rehearse: Gives the mean loss, over its scale, after some updates at a cut.
        largest: The first cut tried.
        few: Whether they are very few.
        tries: How many are tried at most.
        updates: Updates of each try.

    Returns:
        The cut, ``None`` where no rate helped or a rehearsal could not be had.
    """
    before = rehearse(largest, 0)
    if before is None or not math.isfinite(before):
        return None
    best, lowest, best_after, least = None, largest, before, 0.0
    for power in range(tries):
        cut = largest * 0.25**power
        after = rehearse(cut, updates)
        if after is None:
            return None
        by_heart = before > _AS_GOOD and 0 <= best_after <= _BY_HEART
        counted = before if by_heart else min(before - best_after, _COUNTED * abs(best_after))
        if after < best_after:
            best, lowest, best_after, least = cut, cut, after, _LEAST_OF_BEST * cut
        elif best is not None and after > before + _WORSE:
            # A lower rate does harm: the larger one was good by accident (units died, say), and what helps is better.
            best_after, least = before - _WORSE, 0.0
        elif best is not None:
            missing = _MISSING_OF_MUCH if best_after < 0.5 * before and not few else _MISSING
            if after > best_after + missing * counted:
                break
            lowest = cut
            if by_heart and after <= _AS_GOOD:
                least = min(least, cut)
            elif cut <= least:
                break
    return None if best is None else min(_MOST_OF_BEST * best, max(lowest, least))


def clipping_will_do(rehearse: Callable[[float, int], float | None], cut: float, *, updates: int = 8) -> bool:
    """Whether, under the clipping that has just begun, the rate learns the newest batches about as fast as at two cuts.

    A rate that is too high by itself never does: at a lower one it does less harm.

    Args:
        rehearse: Gives the mean loss after some updates at a cut.
        cut: The first cut; the second is a quarter of it.
        updates: Updates of each try.
    """
    before, uncut = rehearse(1.0, 0), rehearse(1.0, updates)
    if before is None or uncut is None or not uncut < before:
        return False
    lower = (rehearse(one, updates) for one in (cut, cut / 4))
    return all(after is not None and uncut < after + _NEARLY * max(0.0, before - after) for after in lower)


@final
class ClipGradients(Remedy):
    """Turn gradient clipping on when gradients are what explodes.

    Args:
        clip_val: Largest norm (or absolute value), or ``"auto"``: twice the usual one of the healthy norms seen, their
            lower quartile (1.0 where none were seen).
        algorithm: ``"norm"`` or ``"value"``.
        recover_after: Healthy updates after which clipping ends.

    Raises:
        ValueError: When an argument is out of its range.
    """

    word = "clip"
    step = Clip
    _kinds = frozenset(
        {"gradient_spike", "gradient_overflow", "non_finite_gradient", "non_finite_loss", "exploding_loss"}
    )

    def __init__(
        self,
        clip_val: float | Literal["auto"] = "auto",
        algorithm: Literal["norm", "value"] = "norm",
        recover_after: int = 1000,
    ) -> None:
        is_number = isinstance(clip_val, (int, float)) and not isinstance(clip_val, bool)
        valid = clip_val == "auto" or (is_number and 0 < float(clip_val) < math.inf)
        require(valid, self, "clip_val", clip_val, '"auto" or a finite number above 0')
        require(algorithm in ("norm", "value"), self, "algorithm", algorithm, '"norm" or "value"')
        require(
            clip_val != "auto" or algorithm == "norm",
            self,
            "algorithm",
            algorithm,
            '"norm" with clip_val="auto", which is taken from gradient norms',
        )
        require(recover_after >= 1, self, "recover_after", recover_after, "an integer of at least 1")
        self.clip_val = clip_val
        self.recover_after = recover_after
        self.algorithm = algorithm

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """Clipping, where gradients are at fault, or one that came out of nothing led to a fault of the learner."""
        # Where the scheduled rate has just risen, the rate is the first to suspect.
        concerned = fault.kind in self._kinds or evidence.burst
        if not concerned or not evidence.clippable or (evidence.rate_rose and attempt == 0):
            return None
        if isinstance(self.clip_val, str):
            if evidence.usual_norm is not None and evidence.usual_norm > 0:
                return Clip(2.0 * evidence.usual_norm, self.algorithm)
            # Nothing was usual yet: the value most people start with.
            return Clip(1.0, self.algorithm)
        return Clip(float(self.clip_val), self.algorithm)

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Turn clipping on."""
        assert isinstance(step, Clip)
        patient.clip(step.value, step.algorithm)


@final
class ResetMoments(Remedy):
    """Forget the optimizer's moments, from the second attempt on."""

    word = "reset moments"
    step = DropMoments

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A reset, once a first attempt did not help."""
        return DropMoments() if attempt > 0 else None

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Empty the optimizers' state."""
        patient.drop_moments()


@final
class StopTraining(Remedy):
    """End the run with a clear error, the last good weights in place."""

    word = "stop"
    step = Stop

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A stop."""
        return Stop("the remedies listed ask to stop when skipping is not enough")

    def apply(self, step: PlanStep, patient: Patient) -> None:
        """Nothing: the engine ends the run itself."""


def default_remedies() -> tuple[Remedy, ...]:
    """What ``NaNGuard(remedies=None)`` uses."""
    return (Rollback(), ClipGradients(), ReduceLR())


def executors(remedies: Sequence[Remedy]) -> dict[type[PlanStep], Remedy]:
    """Who carries out which step: the user's own instance where listed, a default one for what is always allowed.

    Raises:
        ValueError: When two remedies claim the same kind of step.
    """
    listed: dict[type[PlanStep], Remedy] = {}
    for remedy in remedies:
        if remedy.step in listed:
            raise ValueError(
                f"remedies: {type(remedy).__name__} and {type(listed[remedy.step]).__name__} both carry out "
                f"{remedy.step.__name__}; list one of them."
            )
        listed[remedy.step] = remedy
    always: tuple[Remedy, ...] = (SkipStep(), Rollback(), ReduceLR(), ClipGradients(), ResetMoments(), StopTraining())
    return {remedy.step: remedy for remedy in always} | listed
