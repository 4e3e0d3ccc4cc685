"""Suspicions that were none are silent for a while."""

from __future__ import annotations

from lightning_nanguard.detect.dismissals import Dismissals
from lightning_nanguard.thresholds.detection import DismissalThresholds


def test_each_dismissal_of_a_kind_lasts_longer() -> None:
    """A kind is silent for the first pause, then four times as long each time up to the longest; others are not."""
    dismissed = Dismissals(DismissalThresholds(first_pause=2, growth=4, longest_pause=20))
    pauses = []
    for _ in range(4):
        dismissed.add("stuck_loss", 100, 1.0)
        pauses.append(next(n for n in range(99) if not dismissed.silences("stuck_loss", 100 + n, 1.0)))
    assert pauses == [2, 8, 20, 20]
    assert not dismissed.silences("collapsed", 101, 1.0)
    dismissed.clear()
    assert not dismissed.silences("stuck_loss", 101, 1.0)


def test_the_longest_pause_of_a_kind_may_be_shorter() -> None:
    """The pause after the next dismissal is cut to what the caller says."""
    dismissed = Dismissals(DismissalThresholds(first_pause=10))
    dismissed.add("overshoot", 0, 1.0, longest_pause=15)
    dismissed.add("overshoot", 100, 1.0, longest_pause=15)
    assert dismissed.silences("overshoot", 114, 1.0)
    assert not dismissed.silences("overshoot", 115, 1.0)


def test_a_loss_far_higher_is_not_silenced() -> None:
    """A suspicion whose loss is ten times the size of the dismissed one is raised; a checkpoint keeps all of it."""
    dismissed, resumed = Dismissals(), Dismissals()
    dismissed.add("exploding_loss", 0, -2.0)
    resumed.load(dismissed.state())
    assert dismissed.state() == {"exploding_loss": [25, 100, -2.0]}
    for one in (dismissed, resumed):
        assert one.silences("exploding_loss", 10, 20.0)
        assert not one.silences("exploding_loss", 10, 20.1)
