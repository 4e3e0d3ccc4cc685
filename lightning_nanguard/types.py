"""The data that the folders of the package hand to each other: frozen, standard library only.

The order of a step is measure → detect → decide → act → record. A :class:`Reading` leaves *measure*, a
:class:`Fault` leaves *detect*, a :data:`Plan` leaves *decide*, and an :class:`Intervention` is what *record* keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

SCHEMA_VERSION = 1
"""Version of the JSON written by :meth:`Intervention.to_dict`; raised when a field changes its meaning."""

ActOn = Literal["certain", "evidence"]
"""For what the guard changes a run: only for what is certain, or also for finite suspicions that evidence confirms."""

Scope = Literal["batch", "learner", "state"]
"""What is at fault: one batch, the learner (weights, rate, clipping), or state that went bad by itself."""

Row = int | str
"""A row of a data set: its index, or in words what a sampler of the user's draws."""


class Reading(NamedTuple):
    """What was measured about one update, on the host.

    Made in every step, and so a named tuple: the cheapest record that cannot be changed.

    Attributes:
        step: The guard's own count of attempted updates; it never goes back.
        optimizer_index: Index of the optimizer; each optimizer has its own history.
        loss: Mean loss of the update's micro-batches, unscaled; ``None`` where the update had no loss.
        grad_norm: 2-norm of the gradient before clipping, unscaled; ``None`` where there was no gradient.
        finite: Whether every loss of the update and every element of its gradient is finite.
        loss_finite: Whether every loss of the update is finite.
        scaler_skips: Whether a GradScaler skips this update by itself (fp16 overflow).
        loss_scale: The GradScaler's scale, ``None`` without one.
    """

    step: int
    optimizer_index: int
    loss: float | None
    grad_norm: float | None
    finite: bool = True
    loss_finite: bool = True
    scaler_skips: bool = False
    loss_scale: float | None = None

    @property
    def stream(self) -> int:
        """The former name of :attr:`optimizer_index`, for detectors written for version 0.1.0."""
        return self.optimizer_index


Verdict = Literal["gained", "cost", "no difference", "not measured"]
"""What came of an intervention on finite evidence."""

Proof = Literal["trial", "none"]
"""What confirms the suspicion that the learner diverged, before anything is changed.

``"trial"``: a lower rate learns, from an earlier state, what the run does not. ``"none"``: nothing has to be confirmed.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a detector found.

    The first five attributes say what was found and where. ``scope`` and all from ``doubtful`` on are traits: the
    guard decides by them alone how to treat a fault, so a fault of your own is treated like a built-in one.

    Attributes:
        kind: A short identifier, such as ``"non_finite_loss"``. It is shown and recorded; no decision looks at it.
        scope: What is at fault; it routes the fault to a remedy.
        place: Where: ``"loss"``, ``"gradient of encoder.0.weight"``, ``"buffer bn.running_mean"``.
        value: The number by which it was detected, ``None`` where there is none.
        message: One sentence for the user.
        doubtful: True if it counts as a fault only when the batch holds numbers far larger than recent healthy batches;
            otherwise the reading is accepted. Example: a high gradient norm during warm-up.
        since: For a fault that is reported some readings after it began: step of the last reading before it began. Only
            snapshots from before that step are trusted. The loss may have recovered by itself meanwhile. ``None`` for a
            fault that is reported at once.
        certain: True if a number is not finite or overflows, such as a NaN loss; False if it is finite but unusual and
            may prove harmless, such as a gradient spike. With ``NaNGuard(act_on="certain")``, the default, the user is
            only told of a fault that is not certain.
        extreme: True if the value is out of all proportion to every value accepted before. A finite fault of a batch
            counts as certain if it is extreme and the inputs of the batch are out of all proportion, too.
        proof: What confirms a suspicion of the learner.
        clipping_helps: True if gradient clipping helps against it.
        rate_may_cause: True if a rise of the learning rate since the snapshot can explain bad state; the learner is
            then blamed instead.
        conclusive: True if the detector has already established that ``scope`` is at fault, so that no further evidence
            can change it. Example: statistics were in range before a batch and far out of range after it.
        only_if_corrupt: True if the guard acts only where a tensor of the learner is not finite, and else only records
            it. Example: a validation loss that is not finite.
    """

    kind: str
    scope: Scope
    place: str
    value: float | None = None
    message: str = ""
    doubtful: bool = False
    since: int | None = None
    certain: bool = True
    extreme: bool = False
    proof: Proof = "trial"
    clipping_helps: bool = False
    rate_may_cause: bool = False
    conclusive: bool = False
    only_if_corrupt: bool = False


Role = Literal["skip", "restore", "rate", "clip", "moments", "notify", "stop"]
"""What a remedy is for. The policy asks a remedy whenever its verdict on a fault calls for this role."""


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One entry of a plan. Subclass it to give a remedy of your own something to carry out."""


@dataclass(frozen=True, slots=True)
class Skip(PlanStep):
    """Leave the update out, and undo what its batch changed (such as running statistics)."""


@dataclass(frozen=True, slots=True)
class Restore(PlanStep):
    """Go back to a certified snapshot; ``depth`` 0 is the newest."""

    depth: int = 0


@dataclass(frozen=True, slots=True)
class Scale(PlanStep):
    """Multiply the learning rate by ``factor``; the product never falls below ``min_lr``.

    Attributes:
        factor: The factor that is planned. A remedy that tries rates may choose another one.
        min_lr: Lowest learning rate that may result.
        least: Factor at which the rate was proven before. A remedy that tries rates goes below it only where its trials
            find a far lower rate.
        limit: True if the resulting rate becomes the largest that is allowed, below which the schedule goes on; for a
            rate that its schedule has just raised.
        most: Largest factor at which the curvature of the loss lets the loss fall. It bounds the factor where no rates
            can be tried.
        firm: True if ``most`` bounds the factor also where rates are tried.
        tried: True if a trial has found the factor, so that no rate has to be tried.
        clipped: True if the plan also clips gradients, so that the rate may stay if clipping suffices.
    """

    factor: float
    min_lr: float = 0.0
    least: float = 0.0
    limit: bool = False
    most: float = math.inf
    firm: bool = False
    tried: bool = False
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Clip(PlanStep):
    """Clip gradients from now on."""

    value: float
    algorithm: Literal["norm", "value"] = "norm"


@dataclass(frozen=True, slots=True)
class DropMoments(PlanStep):
    """Forget the optimizer's state, as if it had been made anew."""


@dataclass(frozen=True, slots=True)
class Stop(PlanStep):
    """End the run with a :class:`~lightning_nanguard.TrainingDivergedError`."""

    reason: str


Plan = tuple[PlanStep, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause that the diagnosis found, with its evidence.

    Attributes:
        cause: Identifier of the cause, such as ``"non_finite_input"``.
        confidence: From 0 to 1.
        evidence: The numbers it rests on; where ``rows`` are not known, ``position`` and ``hash`` of the samples.
        place: Module, operation or tensor.
        samples: Indices of the batch's samples concerned.
        suggestion: What the user should do.
        scope: What is at fault by this finding, as in :class:`Fault`; ``None`` where it does not say. The learning rate
            is not cut for a finding that blames the batch, unless the last good weights do better on it.
        rows: Rows of the data set that ``samples`` are, in the same order; empty where they are not known.
    """

    cause: str
    confidence: float
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    place: str = ""
    samples: tuple[int, ...] = ()
    suggestion: str = ""
    scope: Scope | None = None
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Intervention:
    """One thing the guard did, or with ``observe=True`` would have done.

    Attributes:
        global_step: The trainer's ``global_step`` when the fault was found.
        epoch: The trainer's ``current_epoch``.
        batch_idx: Index of the batch in its epoch, ``-1`` outside a batch.
        fault: Kind of the fault.
        place: Where it showed.
        remedies: What was done, in order, as short words (``"skip"``, ``"restore"``, ``"scale"``, ``"clip"``, …).
        lr_before: Effective learning rate of the first group before.
        lr_after: Effective learning rate of the first group after.
        snapshot_step: ``global_step`` of the state gone back to, ``None`` without a rollback.
        cause: Identifier of the cause found, ``None`` where none was.
        finding: The whole finding, ``None`` where there is none.
        message: The fault in one sentence.
        value: The number by which the fault was detected; NaN and Inf are kept.
        applied: ``False`` where ``observe=True`` kept the guard from acting.
        ranks: Ranks that saw the fault, where not all of them did; empty with one process.
        updates_lost: Updates that a rollback undid, the faulty one included; 0 where they were made again.
        run: Id of the run; ``""`` in records of version 0.1.0. Two records of different runs may be equal.
    """

    global_step: int
    epoch: int
    batch_idx: int
    fault: str
    place: str
    remedies: tuple[str, ...]
    lr_before: float | None
    lr_after: float | None
    snapshot_step: int | None = None
    cause: str | None = None
    finding: Finding | None = None
    message: str = ""
    value: float | None = None
    applied: bool = True
    ranks: tuple[int, ...] = ()
    updates_lost: int = 0
    run: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that ``json.dumps(…, allow_nan=False)`` accepts: non-finite numbers become strings.

        Example:
            >>> Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1).to_dict()["remedies"]
            ['skip']
        """
        return {"schema": SCHEMA_VERSION, **plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Intervention:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: When ``data`` lacks a field that every version has.
        """
        values = {key: _number(key, value) for key, value in data.items() if key in _names(cls)}
        try:
            finding, ranks = values.pop("finding", None), tuple(map(int, values.pop("ranks", ())))
            values |= {"remedies": tuple(values["remedies"]), "ranks": ranks}
            return cls(**values, finding=None if finding is None else _finding(finding))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of an intervention: {error}; its keys are {sorted(data)}") from error


@dataclass(frozen=True, slots=True)
class Advice:
    """Something the guard noticed and only reports; it is no intervention and not counted as one.

    Attributes:
        global_step: The trainer's ``global_step`` when it was noticed.
        epoch: The trainer's ``current_epoch``.
        occasion: Why the guard looked: ``"preflight"``, …
        finding: What it found.
        run: Id of the run; ``""`` in advice of version 0.1.0.
    """

    global_step: int
    epoch: int
    occasion: str
    finding: Finding
    run: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that ``json.dumps(…, allow_nan=False)`` accepts: non-finite numbers become strings."""
        return {"schema": SCHEMA_VERSION, **plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Advice:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: When ``data`` lacks a field.
        """
        try:
            values = {key: data[key] for key in _names(cls) & set(data)}
            return cls(**{**values, "finding": _finding(values["finding"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of advice: {error}; its keys are {sorted(data)}") from error


def _finding(data: Mapping[str, Any]) -> Finding:
    found = {key: _number(key, data[key]) for key in _names(Finding) & set(data)}
    found |= {key: tuple(found.get(key, ())) for key in ("samples", "rows")}
    return Finding(**{**found, "evidence": {key: _spelled(value) for key, value in found.get("evidence", {}).items()}})


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """Plain containers that ``json.dumps(…, allow_nan=False)`` accepts: non-finite numbers become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


_NUMBERS = frozenset({"lr_before", "lr_after", "value", "confidence"})


def _names(of: type[Intervention | Finding | Advice]) -> set[str]:
    return {f.name for f in fields(of)}


def _number(key: str, value: Any) -> Any:
    return _spelled(value) if key in _NUMBERS else value  # a place or a message may be the word "NaN"


def _spelled(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Comparison:
    """Loss of a batch under the present weights and under the last good ones, with the same random numbers.

    Attributes:
        now: Loss under the present weights. If the faulty update was already made, the lower of this loss and the one
            read before that update.
        then: Loss under the last good weights.
        then_finite: Whether the gradient is finite under the last good weights; ``None`` where it was not computed.
    """

    now: float
    then: float
    then_finite: bool | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial showed.

    Attributes:
        lacks: Share of what can be learned that the run lacks, after as many updates as a restart with a lower rate
            made; 0 where it lacks none, or hardly any.
        base: Which state to go back to: the one of the lowest loss level, or the start.
        factor: What the restart multiplied the learning rate by.
    """

    lacks: float = 0.0
    base: Literal["best", "start"] = "start"
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the guard knows about a fault; the policy decides by it.

    Attributes:
        step: Number of updates attempted so far.
        healthy_steps: Updates accepted since the start of fit.
        healthy_since_restore: Updates accepted since the last restore; ``None`` without one.
        bad_in_a_row: Faulty updates in a row, this one included.
        corrupt: Name of the first tensor of the learner that is not finite but was at the start; ``None`` without one.
        jump: Name of a weight that is finite but far larger than any was in the snapshot; ``None`` if none is.
        batch_strange: Whether its numbers are far larger than those of the batches kept; ``None`` where not known.
        batch_finite: Whether every floating number in the batch is finite; ``None`` where it was not looked at.
        comparable: Whether a batch could be run again at all (automatic optimization).
        clippable: Whether the optimizer works with clipped gradients; LBFGS, which estimates curvature, does not.
        comparison: Loss of the batch under the present weights and the snapshot's; ``None`` where not measured.
        first: Loss of the first healthy update of the run ("the untrained model's loss"); 0 before it.
        loss_unit: Unit in which losses are compared: how far the loss has come down, or its noise if that is larger.
        growth: Largest ratio of a weight matrix's norm to its norm at the start.
        trial: What a trial showed; ``None`` where none was made.
        climbing: Whether losses or gradient norms were rising out of their usual range just before the fault.
        burst: Whether, before a fault of the learner, a recent gradient norm was suddenly far above those before it.
        rate_rose: Whether the effective learning rate is clearly above that of the snapshot.
        snapshots: Number of certified snapshots.
        levels: Loss level of every certified snapshot, newest first.
        sound: Depth (0 is the newest) of the newest certified snapshot from before ``Fault.since``, or of a trial's
            base; ``None`` without either.
        usual_norm: A low quantile of the healthy gradient norms kept; ``None`` with too few.
        lr: Effective learning rate of the first group.
        highest_lr: Highest effective rate since the snapshot to go back to; ``None`` where it is not known.
        lowest_lr: Lowest effective rate so far; ``None`` where it is not known.
        multiplier: The learning-rate multiplier in force.
        undo: True if a batch's faulty update was made before its reading arrived, so that a restore has to undo it.
        ranks: Ranks whose state or batch is not finite; empty where all are concerned, or there is one process.
        again: Cause of bad state where it came back when the updates since the last good state were made again:
            ``"optimizer_update"`` or ``"forward_writes_buffer"``, else ``""``; and where it did.
        told: A finite suspicion since the last good state of which the user was told; ``""`` without one.
    """

    step: int
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 1
    corrupt: str | None = None
    jump: str | None = None
    batch_strange: bool | None = None
    batch_finite: bool | None = None
    comparable: bool = True
    clippable: bool = True
    comparison: Comparison | None = None
    first: float = 0.0
    loss_unit: float = 1.0
    growth: float = 1.0
    trial: Trial | None = None
    climbing: bool = False
    burst: bool = False
    rate_rose: bool = False
    snapshots: int = 0
    levels: tuple[float | None, ...] = ()
    sound: int | None = None
    usual_norm: float | None = None
    lr: float | None = None
    highest_lr: float | None = None
    lowest_lr: float | None = None
    multiplier: float = 1.0
    undo: bool = False
    ranks: tuple[int, ...] = ()
    again: tuple[str, str] = ("", "")
    told: str = ""
