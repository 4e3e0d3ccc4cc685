"""What a rule is given."""

from __future__ import annotations

from lightning_nanguard import NO_FAULT, Case, Curvature, Origin, Range


def test_an_empty_case_is_one() -> None:
    """Every part may be missing; without a fault the case is that of a look at a run or a model."""
    case = Case()
    assert case.fault is NO_FAULT
    assert (case.clues.bad_fields, case.model, case.course, case.curvature) == ((), None, None, None)


def test_numbers_that_are_derived() -> None:
    """The place of an operation, the root mean square of an input, and the largest rate along a direction."""
    assert Origin("log", "net.2", "model.py:41").place == "net.2 (log, model.py:41)"
    assert Origin("log", backward=True).place == "training_step (backward of log)"
    assert Range("0", "float32", -4.0, 4.0, mean=3.0, std=4.0).magnitude == 5.0
    assert Curvature(slope=1.0, bend=4.0).largest_rate == 0.5
    assert Curvature(slope=1.0, bend=-4.0).largest_rate is None
