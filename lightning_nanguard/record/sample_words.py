"""Describes the samples of a finding in words."""

from __future__ import annotations

from lightning_nanguard.record.text import listed_numbers
from lightning_nanguard.types import Finding


def origin_in_words(finding: Finding) -> str:
    """The rows of a finding's samples, how often they were found, and on which rank; empty if not known.

    Args:
        finding: The finding.

    Example:
        >>> origin_in_words(Finding("bad_label", 1.0, {"times_met": 3.0, "rank": 1.0}, samples=(4,), rows=(100,)))
        'row 100 of the data set, seen 3 times, on rank 1'
    """
    known = finding.evidence
    if finding.rows:
        words = [f"{listed_numbers('row', finding.rows)} of the data set"]
    elif "hash" in known and "position" in known:
        words = [f"batch {_number(known['position'])} of the epoch"]
        words += [f"hash {known['hash']}"] if known["hash"] else []
    else:
        words = []
    if "times_met" in known:
        often = "up to " if len(finding.rows or finding.samples) > 1 else ""
        words.append(f"seen {often}{_number(known['times_met'])} times")
    if "rank" in known:
        words.append(f"on rank {_number(known['rank'])}")
    return ", ".join(words)


def samples_in_words(finding: Finding) -> str:
    """The samples of a finding: their rows if these are known, else their places in the batch.

    Args:
        finding: The finding.
    """
    places = listed_numbers("sample", finding.samples) if finding.samples else ""
    if finding.rows:
        return origin_in_words(finding)
    return ", ".join(part for part in (places, origin_in_words(finding)) if part)


def _number(value: float | str) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value - value == 0.0 else str(value)
