"""For which numbers operations are defined."""

from __future__ import annotations

import pytest

from lightning_nanguard import Origin
from lightning_nanguard.diagnosis.rules.domains import largest_exponent, outside, squares_overflow


@pytest.mark.parametrize(
    ("operation", "lowest", "highest", "left"),
    [
        ("log", 0.0, 1.0, True),
        ("log", 0.1, 1.0, False),
        ("sqrt", 0.0, 1.0, False),
        ("sqrt", -0.1, 1.0, True),
        ("logit", 0.5, 1.0, True),
        ("acos", -1.0, 1.0, False),
        ("acos", -1.0, 1.1, True),
        ("mm", 0.0, 1.0, None),
        ("log", None, None, None),
    ],
)
def test_numbers_lie_inside_or_outside(
    operation: str, lowest: float | None, highest: float | None, left: bool | None
) -> None:
    """The ends belong to some domains; nothing is said of numbers or operations that are not known."""
    assert outside(Origin(operation, lowest=lowest, highest=highest)) is left


def test_what_a_format_holds() -> None:
    """A power of two overflows later than an exponential, and a half much sooner."""
    assert [largest_exponent(Origin(name)) for name in ("exp", "exp2")] == [88, 128]
    assert [largest_exponent(Origin(name, dtype="float16")) for name in ("exp", "exp2")] == [11, 16]
    assert squares_overflow(Origin("var", lowest=-1e20, highest=1.0))
    assert not squares_overflow(Origin("var", lowest=-1e10, highest=1.0))
