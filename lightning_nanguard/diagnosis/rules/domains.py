"""Domains of operations, and the numbers above which their results overflow."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nanguard.diagnosis.case import Origin
from lightning_nanguard.thresholds.fixed import LARGEST_WITH_SQUARE


@dataclass(frozen=True, slots=True)
class Domain:
    """The numbers that an operation is defined for.

    Attributes:
        words: The domain in words, such as ``"above 0"``.
        low: Lower end.
        high: Upper end; ``None`` if there is none.
        open: Whether the ends themselves are excluded.
    """

    words: str
    low: float
    high: float | None = None
    open: bool = True

    def leaves(self, lowest: float, highest: float) -> bool:
        """Whether a part of the range from ``lowest`` to ``highest`` lies outside the domain."""
        low = lowest <= self.low if self.open else lowest < self.low
        if self.high is None:
            return low
        return low or (highest >= self.high if self.open else highest > self.high)


DOMAINS: dict[str, Domain] = {
    "log": Domain("above 0", 0.0),
    "log2": Domain("above 0", 0.0),
    "log10": Domain("above 0", 0.0),
    "log1p": Domain("above -1", -1.0),
    "sqrt": Domain("of at least 0", 0.0, open=False),
    "rsqrt": Domain("above 0", 0.0),
    "pow": Domain("of at least 0", 0.0, open=False),
    "xlogy": Domain("above 0", 0.0),
    "logit": Domain("above 0 and below 1", 0.0, 1.0),
    "lgamma": Domain("above 0", 0.0),
    "acos": Domain("between -1 and 1", -1.0, 1.0, open=False),
    "asin": Domain("between -1 and 1", -1.0, 1.0, open=False),
    "atanh": Domain("above -1 and below 1", -1.0, 1.0),
}
"""What is defined for some numbers only."""


def outside(origin: Origin) -> bool | None:
    """Whether the input of an operation lies outside its domain; ``None`` if this is not known."""
    domain = DOMAINS.get(origin.operation)
    if origin.operation == "pow" and (origin.exponent or 0.0).is_integer():
        return False  # defined for every number, so it can only overflow
    if domain is None or origin.lowest is None or origin.highest is None:
        return None
    return domain.leaves(origin.lowest, origin.highest)


# The largest exponent that does not overflow in each format, to base e and to base 2.
_EXPONENTS = {"float16": (11.0, 16.0), "float64": (709.0, 1024.0)}
_SINGLE = (88.0, 128.0)
# The square of a larger number overflows.
_SQUARES = {"float16": 255.0, "float64": 1e154}


def largest_exponent(origin: Origin) -> float:
    """The number above which the exponential overflows in the format of an operation."""
    return _EXPONENTS.get(origin.dtype, _SINGLE)[origin.operation == "exp2"]


def squares_overflow(origin: Origin) -> bool:
    """Whether the squares of an operation's input overflow."""
    largest = max(abs(origin.lowest or 0.0), abs(origin.highest or 0.0))
    return largest > _SQUARES.get(origin.dtype, LARGEST_WITH_SQUARE)
