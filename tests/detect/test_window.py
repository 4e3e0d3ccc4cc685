"""Windows of the newest values."""

from __future__ import annotations

from lightning_nanguard import Window


def test_a_rewound_window_forgets_what_came_after() -> None:
    """Going back to a step forgets what was accepted after it."""
    window = Window(4)
    for step in range(6):
        window.append(step, float(step))
    window.rewind(4)
    assert window.values() == [2.0, 3.0, 4.0]


def test_the_newest_values() -> None:
    """A window tells its newest values, the oldest first, and another window can load its state."""
    window = Window(3)
    for step in (2, 4, 6, 8):
        window.append(step, step / 10)
    assert (len(window), window.last(2), window.last(9)) == (3, [0.6, 0.8], [0.4, 0.6, 0.8])
    other = Window(3)
    other.load(window.state())
    assert other.state() == window.state() == [[4, 0.4], [6, 0.6], [8, 0.8]]
