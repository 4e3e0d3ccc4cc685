"""Makes text safe to show, whatever a record holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE

STEPS = (
    "Step N is the state after update N (Lightning's global_step): the first update is step 1. Epochs, batches, "
    "samples, rows and columns count from 0."
)
"""What the numbers in messages count."""


def name_of(part: object) -> str:
    """Name of a function, or of the class of another object, with its module.

    Example:
        >>> name_of(print), name_of(0.5)
        ('builtins.print', 'builtins.float')
    """
    named: Any = part if hasattr(part, "__qualname__") else type(part)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def printable(text: str) -> str:
    r"""One line of text in which characters that control a terminal or the direction of text are escaped.

    Names and messages come from the user's code and data, or from a file that somebody sent.

    Example:
        >>> printable("a\x1b[2Jb\nc")
        'a\\x1b[2Jb c'
    """
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def shortened(text: str, most: int) -> str:
    """One line of text of at most ``most`` characters; if more were left out, it ends with ``…``.

    Example:
        >>> shortened("loss  is  nan", 80), shortened("a long text", 7)
        ('loss is nan', 'a long…')
    """
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def in_words(identifier: str) -> str:
    """An identifier of a fault or a cause in words.

    Example:
        >>> in_words("non_finite_loss")
        'non-finite loss'
    """
    return identifier.replace("_", " ").replace("non finite", "non-finite")


def with_line(name: str, line: str) -> str:
    """A name with its line in the user's code, such as ``log, model.py:41``; the name alone without a known line."""
    return f"{name}, {line}" if line else name


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun, such as ``"1 record"`` or ``"1,200 records"``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def joined(words: Sequence[str], most: int) -> str:
    """Words in a row. If there are too many, the rest is counted.

    Example:
        >>> joined(["body", "neck"], 4), joined(["body", "neck", "head"], 2)
        ('body and neck', 'body, neck and 1 more')
    """
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most:,} more"
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def listed_numbers(noun: str, numbers: Sequence[int | str]) -> str:
    """Numbers with their noun, such as ``"lines 2, 5, 7"``. If there are too many, the rest is counted."""
    more = len(numbers) - NUMBERS_PER_MESSAGE
    shown = ", ".join(str(number) for number in islice(numbers, NUMBERS_PER_MESSAGE))
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{f' and {more:,} more' if more > 0 else ''}"
