"""What the guard knows about a fault when it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Comparison:
    """Loss of a batch under the present weights and under the last good ones, with the same random numbers.

    Attributes:
        now: Loss under the present weights. If the faulty update was already made, the lower of this loss and the one
            read before that update.
        then: Loss under the last good weights.
        then_finite: Whether the gradient is finite under the last good weights; ``None`` if it was not computed.
        holds_elsewhere: Whether the present weights do no worse than the good ones on most of the newest healthy
            batches, or not clearly worse if only this batch is bad; ``None`` if not measured. Weights that have
            diverged are clearly worse on all.
    """

    now: float
    then: float
    then_finite: bool | None = None
    holds_elsewhere: bool | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    Attributes:
        lacks: Share of what can be learned that the run lacks, compared with a restart at a lower rate after the same
            number of updates; 0 if it lacks none, or hardly any.
        base: The state to go back to, or that the arm started from: the one of the lowest loss level, or the start.
        factor: Factor by which the arm multiplied the learning rate.
        continues: Whether the run should continue from the trained arm instead of from the base.
    """

    lacks: float = 0.0
    base: Literal["best", "start"] = "start"
    factor: float = 1.0
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts about a fault by which the policy decides.

    Attributes:
        step: Number of updates attempted so far.
        healthy_steps: Updates accepted since the start of fit.
        healthy_since_restore: Updates accepted since the last restore; ``None`` without one.
        bad_in_a_row: Faulty updates in a row, this one included.
        good_beside: ``step`` of the newest of these updates for which another optimizer's update on the same batch was
            accepted; ``None`` if there is none.
        corrupt: Name of the first tensor of the learner that is not finite but was at the start; ``None`` without one.
        alone: What alone is bad, so that only it has to be restored; ``None`` if more may be bad. ``"averages"`` are
            averaged copies of the weights, parameters that no optimizer trains, or running statistics of layers that
            normalise by the batch: no update is made from them. ``"scale"`` is the scale of the GradScaler, which
            skips every update with such a scale.
        jump: Name of a weight that is finite but far larger than any was in the snapshot; ``None`` if none is.
        batch_strange: Whether the batch holds numbers far larger than those of the stored batches; ``None`` if this is
            not known.
        batch_finite: Whether every floating number in the batch is finite; ``None`` if it was not looked at.
        comparable: Whether a batch could be run again at all (automatic optimization).
        clippable: Whether the optimizer works with clipped gradients; LBFGS, which estimates curvature, does not.
        comparison: Loss of the batch under the present weights and the snapshot's; ``None`` if not measured.
        first: Loss of the first healthy update of the run ("the untrained model's loss"); 0 before it.
        loss_unit: Unit in which losses are compared: how far the loss has come down, or its noise if that is larger.
        redo_failed: Whether the fault was there again when the updates since a snapshot were made again. So it did not
            happen by chance, and the updates caused it.
        redone: Whether every update since a snapshot was made again with its own batch and rate, and the fault was
            gone. So neither the batches nor the rate caused it.
        growth: Largest ratio of a weight matrix's norm to its norm at the start.
        trial: What a trial showed; ``None`` if none was made.
        climbing: Whether losses or gradient norms rose above their usual range just before the fault.
        burst: Whether, before a fault of the learner, a recent gradient norm was suddenly far above those before it.
        rate_rose: Whether the effective learning rate is clearly above that of the snapshot.
        levels: Loss level of every certified snapshot, newest first; ``None`` for a level that is not known.
        usual_norm: A low quantile of the healthy gradient norms kept; ``None`` with too few.
        lr: Effective learning rate of the first group.
        highest_lr: Highest effective rate since the snapshot to go back to; ``None`` if it is not known.
        first_lr: Effective rate of the first group in the first update that is known; ``None`` if none is.
        lowest_lr: Lowest effective rate so far; ``None`` if it is not known.
        group_lr: Highest effective rate of any parameter group now; ``None`` if it is not known.
        multiplier: The learning-rate multiplier in force.
        undo: True if a batch's faulty update was made before its reading arrived, so that a restore has to undo it.
        redo_cause: If the state became bad again when the updates since the last good state were made again: the cause
            (``"optimizer_update"`` or ``"forward_writes_buffer"``) and the place; otherwise two empty words.
        told: A fault since the last good state that the guard did not act on, in words; ``""`` without one.
    """

    step: int
    healthy_steps: int = 0
    healthy_since_restore: int | None = None
    bad_in_a_row: int = 1
    good_beside: int | None = None
    corrupt: str | None = None
    alone: Literal["averages", "scale"] | None = None
    jump: str | None = None
    batch_strange: bool | None = None
    batch_finite: bool | None = None
    comparable: bool = True
    clippable: bool = True
    comparison: Comparison | None = None
    redo_failed: bool = False
    redone: bool = False
    first: float = 0.0
    loss_unit: float = 1.0
    growth: float = 1.0
    trial: Trial | None = None
    climbing: bool = False
    burst: bool = False
    rate_rose: bool = False
    levels: tuple[float | None, ...] = ()
    usual_norm: float | None = None
    lr: float | None = None
    highest_lr: float | None = None
    first_lr: float | None = None
    lowest_lr: float | None = None
    group_lr: float | None = None
    multiplier: float = 1.0
    undo: bool = False
    redo_cause: tuple[str, str] = ("", "")
    told: str = ""
