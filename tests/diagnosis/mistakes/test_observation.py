"""What the first updates have shown."""

from __future__ import annotations

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import largest_parts
from tests.diagnosis.mistakes.seen import BODY, WELL


@pytest.mark.parametrize(
    ("chosen", "parts"),
    [
        (set(), ()),
        ({"a.0.w"}, ("a.0.w",)),
        ({"a.0.w", "a.0.b"}, ("a.0",)),
        ({"a.0.w", "a.0.b", "a.1.w"}, ("a",)),
        ({"a.0.w", "a.0.b", "w"}, ("a.0", "w")),
    ],
)
def test_parts_are_as_large_as_can_be(chosen: set[str], parts: tuple[str, ...]) -> None:
    """A module is named in place of its parameters where all of them are chosen."""
    assert largest_parts(["a.0.w", "a.0.b", "a.1.w", "w"], chosen) == parts


def test_a_parameter_is_trained_when_all_is_there() -> None:
    """It requires a gradient, gets one, and an optimizer has it."""
    assert BODY.trained
    assert WELL.parts(lambda one: one.trained) == ("body", "head")
