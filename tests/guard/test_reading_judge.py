"""Healthy readings are told from faults, and both wait for the end of the batch."""

from __future__ import annotations

import math

from lightning_nanguard import Reading
from lightning_nanguard.guard.readback import Arrived
from tests.guard.plain_loop import PlainLoop

BAD = Reading(50, 0, math.nan, math.nan, finite=False, loss_finite=False)


def started() -> PlainLoop:
    loop = PlainLoop()
    loop.run(40)
    loop.guard.open_batch()
    return loop


def test_a_healthy_reading_waits_for_the_end_of_its_batch() -> None:
    """It is kept, and nothing is found."""
    loop = started()
    judge, undo = loop.guard._parts.judge, loop.guard._parts.undos[0]
    healthy = Reading(50, 0, 0.01, 0.01)
    judge.judge(Arrived(healthy, undo), 0)
    assert judge.readings == [healthy]
    assert judge.take_found() == []


def test_a_bad_reading_is_found_and_its_step_is_skipped() -> None:
    """It is no history, it is counted, and a bad batch in a row is counted once when the fault is taken."""
    loop = started()
    parts = loop.guard._parts
    parts.judge.judge(Arrived(BAD, parts.undos[0]), 0)
    assert parts.skipper.skipped == {0}
    assert parts.judge.readings == []
    [found] = parts.judge.take_found()
    assert (found.fault.kind, found.reached, loop.guard.non_finite) == ("non_finite_loss", False, 1)
    assert loop.guard.context.state.bad_in_a_row == 1
    assert parts.judge.take_found() == []


def test_late_readings_are_judged_up_to_the_first_fault() -> None:
    """What comes after it is left where it was, and the weights are known to be bad."""
    loop = started()
    parts = loop.guard._parts
    readings = iter([Arrived(BAD, parts.undos[0], reached=True, late=True), Arrived(BAD, parts.undos[0], late=True)])
    parts.judge.judge_late(readings, 0)
    assert len(list(readings)) == 1
    assert parts.judge.weights_are_bad()
    parts.judge.judge_late(iter([Arrived(BAD, parts.undos[0])]), 0)
    assert len(parts.judge.take_found()) == 1


def test_a_further_evaluation_of_one_step_is_no_history() -> None:
    """LBFGS looks at places far off on purpose: a healthy reading of one is not kept."""
    loop = started()
    judge, undo = loop.guard._parts.judge, loop.guard._parts.undos[0]
    judge.judge(Arrived(Reading(50, 0, 0.01, 0.01), undo, line_search=True), 0)
    assert judge.readings == []
