"""The losses that a diverging one is told by."""

from __future__ import annotations

from lightning_nanguard.detect.loss_history import LossHistory


def test_first_and_best() -> None:
    """The best loss is a level, the median of some; before there is one, it is the untrained model's loss."""
    history = LossHistory(8, level_readings=3)
    assert (history.first, history.best, history.since) == (None, None, 0)
    bests = []
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0, 9.0, 9.0]):
        history.accept(step, loss)
        bests.append(history.best)
    # A loss above the best level cannot lower it, and is no reason to look.
    assert bests == [5.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    assert (history.first, history.since) == (5.0, 7)


def test_what_a_rewind_leaves() -> None:
    """A rollback keeps the best level and the untrained loss, unless everything was rewound, and counts anew."""
    history = LossHistory(8, level_readings=2)
    for step, loss in enumerate([5.0, 1.0, 4.0], start=3):
        history.accept(step, loss)
    history.rewind(4)
    assert (history.accepted.values(), history.first, history.best) == ([5.0, 1.0], 5.0, 3.0)
    assert history.since == 0
    history.rewind(2)
    assert (history.accepted.values(), history.first, history.best) == ([], 5.0, 5.0)
    history.accept(9, 7.0)
    assert (history.first, history.best) == (7.0, 7.0)


def test_a_checkpoint_keeps_it() -> None:
    """A history that took up another's state has the same state."""
    history, resumed = LossHistory(8, level_readings=2), LossHistory(8, level_readings=2)
    for step, loss in enumerate([5.0, 1.0, 4.0]):
        history.accept(step, loss)
    resumed.load({**history.state(), "more": 1})
    assert resumed.state() == history.state()
    assert set(history.state()) == {"losses", "first", "first_step", "best", "since"}
