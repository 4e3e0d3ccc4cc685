"""Text is safe to show, and numbers and identifiers read as words."""

from __future__ import annotations

import pytest

from lightning_nanguard.record.text import counted, in_words, joined, listed_numbers, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("learning rate 0.1 → 0.05, 損失", "learning rate 0.1 → 0.05, 損失"),
        ("a\n  b\tc\r\n", "a b c"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\x00\x7f", "\\x9b31m\\x00\\x7f"),
        ("safe\u202eexe.txt\u2066", "safe\\u202eexe.txt\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_only_text_is_shown(text: str, shown: str) -> None:
    """Line breaks become spaces; escapes, controls, reversals of direction and halves of characters are spelled out."""
    assert printable(text) == shown
    shown.encode()


def test_words_and_numbers() -> None:
    """Identifiers are words, one thing is singular, many numbers are counted."""
    assert in_words("learning_rate_too_high") == "learning rate too high"
    assert (counted(1, "record"), counted(1200, "record"), counted(2, "stop", "ends")) == (
        "1 record",
        "1,200 records",
        "2 ends",
    )
    assert listed_numbers("line", [2]) == "line 2"
    assert listed_numbers("line", range(10)) == "lines 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_words_in_a_row() -> None:
    """Many are counted."""
    assert [joined(["a", "b", "c"][:count], 2) for count in (0, 1, 2, 3)] == ["", "a", "a and b", "a, b and 1 more"]
