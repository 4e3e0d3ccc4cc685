"""Every remedy in one table: what it proposes at which attempt, and what the step then does.

To add a remedy of yours, add its rows here; what else it does has a file of its own.
"""

from __future__ import annotations

import pytest

import lightning_nanguard
from lightning_nanguard import (
    ClipGradients,
    Fault,
    ReduceLR,
    Remedy,
    ResetMoments,
    Rollback,
    SkipStep,
    StopTraining,
)
from lightning_nanguard.types import Clip, DropMoments, Evidence, PlanStep, Restore, Scale, Stop
from tests.act.run_control import RunControl

GRADIENT = Fault("gradient_spike", "batch", "gradient", 1e6, certain=False, clipping_helps=True)
LOSS = Fault("exploding_loss", "learner", "loss", 1e6, certain=False, clipping_helps=True)
COLLAPSED = Fault("collapsed", "learner", "loss", 2.3, certain=False)
EVIDENCE = Evidence(step=100, usual_norm=2.0, lr=0.1)

ROWS: list[tuple[Remedy, Fault, int, PlanStep | None, tuple[object, ...] | None]] = [
    (SkipStep(), GRADIENT, 0, None, None),
    (Rollback(), LOSS, 0, Restore(0), ("restore", 0)),
    (Rollback(), LOSS, 1, Restore(0), ("restore", 0)),
    (Rollback(), LOSS, 3, Restore(2), ("restore", 2)),
    (ReduceLR(), LOSS, 0, Scale(0.5), ("scale", 0.5, 0.0)),
    (ReduceLR(factor=0.5, min_lr=1e-3), LOSS, 1, Scale(0.25, 1e-3), ("scale", 0.25, 1e-3)),
    (ReduceLR(), LOSS, 9, Scale(0.1), ("scale", 0.1, 0.0)),
    (ReduceLR(factor=0.01), LOSS, 9, Scale(0.01), ("scale", 0.01, 0.0)),
    (ReduceLR(min_lr=0.1), LOSS, 0, None, None),
    (ClipGradients(), GRADIENT, 0, Clip(4.0), ("clip", 4.0, "norm")),
    (ClipGradients(3), GRADIENT, 0, Clip(3.0), ("clip", 3.0, "norm")),
    (ClipGradients(3.0, "value"), GRADIENT, 0, Clip(3.0, "value"), ("clip", 3.0, "value")),
    (ClipGradients(), LOSS, 0, Clip(4.0), ("clip", 4.0, "norm")),
    (ClipGradients(), COLLAPSED, 0, None, None),
    (ResetMoments(), LOSS, 0, None, None),
    (ResetMoments(), LOSS, 1, DropMoments(), ("drop moments",)),
    (
        StopTraining(),
        LOSS,
        0,
        Stop("skipping is not enough, and StopTraining is listed"),
        None,
    ),
]


@pytest.mark.parametrize(("remedy", "fault", "attempt", "step", "done"), ROWS)
def test_a_remedy_proposes_and_carries_out(
    remedy: Remedy, fault: Fault, attempt: int, step: PlanStep | None, done: tuple[object, ...] | None
) -> None:
    """What is proposed at which attempt, and what the step then does."""
    assert remedy.propose(fault, EVIDENCE, attempt) == step
    if done is not None and step is not None:
        run = RunControl()
        remedy.apply(step, run)
        assert run.done == [done]


def test_every_remedy_has_a_row() -> None:
    """One that is exported but not in the table fails here."""
    exported = {getattr(lightning_nanguard, name) for name in lightning_nanguard.__all__}
    remedies = {one for one in exported if isinstance(one, type) and issubclass(one, Remedy)} - {Remedy}
    assert {type(row[0]) for row in ROWS} == remedies


def test_every_remedy_has_a_word_and_a_step_of_its_own() -> None:
    """The records tell them apart by their words, the guard by their kinds of step."""
    kinds = {type(row[0]) for row in ROWS}
    assert len({kind.word for kind in kinds}) == len({kind.step for kind in kinds}) == len(kinds)
