"""What goes on beside a run goes on together, and ends with it."""

from __future__ import annotations

from tests.guard.branching import BranchingLoop
from tests.guard.plain_loop import remedies


def test_a_trial_and_a_comparison_go_on_together() -> None:
    """While an earlier intervention is compared, a trial of the run finds that its rate ruins it, and what is done then
    is compared in its place; nothing of either is left when the run is over."""
    loop = BranchingLoop(lr=2.0)
    loop.run(50)
    beside = loop.guard._parts.beside
    beside.receipts.before(loop.step, skipped=False)
    loop.run(190)
    assert remedies(loop) == [("restore", "scale")]
    given = loop.guard.context.receipts.given
    assert [one.verdict for one in given] == ["not measured", "gained"]
    assert given[0].reason == "another intervention was made"
    beside.receipts.before(loop.step, skipped=False)
    loop.guard.close()
    assert not beside.trials.running
    assert given[-1].reason == "the run ended first"
