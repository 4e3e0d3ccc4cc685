"""What goes on beside a run goes on together, and ends with it."""

from __future__ import annotations

from tests.guard.branching import BranchingLoop
from tests.guard.plain_loop import remedies


def test_a_trial_and_a_comparison_go_on_together() -> None:
    """While an earlier intervention is compared, a trial of the run finds that its rate ruins it; nothing of either is
    left when the run is over."""
    loop = BranchingLoop(lr=2.0)
    loop.run(50)
    beside = loop.guard._parts.beside
    beside.receipts.before(loop.step, skipped=False)
    loop.run(100)
    assert remedies(loop)[0] == ("restore", "scale")
    first, *others = loop.guard.context.receipts.given
    assert first.reason == "" or first.verdict == "not measured"
    loop.guard.close()
    assert not beside.trials.running
    assert len(loop.guard.context.receipts.given) == len(others) + 1 + (not others)
