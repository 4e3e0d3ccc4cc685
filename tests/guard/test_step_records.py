"""Records of steps that were made again, or from a part of their data."""

from __future__ import annotations

from lightning_nanguard.types import Fault, Finding
from tests.guard.plain_loop import PlainLoop


def test_records_say_how_often() -> None:
    """Counted by place; from the third time on the device is suspected."""
    loop = PlainLoop()
    loop.run(6)
    for place in ("loss", "gradient", "loss", "loss"):
        loop.guard.steps.records.transient(Fault("non_finite_loss", "batch", place))
    findings = [record.finding for record in loop.records]
    assert [one.evidence["times"] for one in findings if one] == [1.0, 1.0, 2.0, 3.0]
    assert ["test the device" in one.suggestion for one in findings if one] == [False, False, False, True]
    assert {record.remedies for record in loop.records} == {("redo",)}


def test_ranks_and_counters_are_named() -> None:
    """A record names the ranks that saw the fault, and the attributes that had to be reset for it to go."""
    loop = PlainLoop()
    loop.run(6)
    fault, cause = Fault("non_finite_loss", "batch", "loss"), Finding("log_of_zero", 0.9, {}, "loss", suggestion="look")
    loop.guard.steps.records.transient(fault, counters=("calls",), ranks=(1,))
    loop.guard.steps.records.left_out(fault, cause, (0,))
    loop.guard.steps.records.kept_good_samples(fault, None)
    loop.guard.steps.records.undone(fault, cause)
    assert [(one.remedies, one.ranks, one.cause) for one in loop.records] == [
        (("redo",), (1,), "transient"),
        (("leave out",), (0,), "log_of_zero"),
        (("keep good samples",), (), None),
        (("undo",), (), "log_of_zero"),
    ]
    assert loop.records[0].finding is not None
    assert "look at how calls is used" in loop.records[0].finding.suggestion
    # The update of the first three is still to be made, and no update is made from the last one's batch.
    assert [one.global_step for one in loop.records] == [7, 7, 7, 6]
