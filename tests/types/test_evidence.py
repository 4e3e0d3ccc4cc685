"""What the guard knows about a fault."""

from __future__ import annotations

from lightning_nanguard.types import Comparison, Evidence, Trial


def test_what_is_not_known_speaks_against_nobody() -> None:
    """Only the number of updates has to be known: the rest says that nothing was found, measured or tried."""
    evidence = Evidence(step=7)
    assert (evidence.corrupt, evidence.jump, evidence.batch_finite, evidence.batch_strange) == (None, None, None, None)
    assert (evidence.comparison, evidence.trial, evidence.alone, evidence.levels) == (None, None, None, ())
    assert (evidence.redo_cause, evidence.told, evidence.undo) == (("", ""), "", False)
    assert (evidence.bad_in_a_row, evidence.multiplier, evidence.loss_unit) == (1, 1.0, 1.0)


def test_a_trial_that_found_nothing_lacks_nothing() -> None:
    """By default a trial asks for no lower rate; a comparison that took no gradient knows nothing of it."""
    assert (Trial().lacks, Trial().factor, Trial().base) == (0.0, 1.0, "start")
    assert (Comparison(2.0, 1.0).then_finite, Comparison(2.0, 1.0).holds_elsewhere) == (None, None)
