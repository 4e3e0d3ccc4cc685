"""Converts interventions to HTML that is safe to show, for any content of a record."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from lightning_nanguard.record.messages import tell
from lightning_nanguard.record.text import printable
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import Intervention


def escaped(text: object) -> str:
    """Escape text for a page: no markup, no control characters.

    Example:
        >>> escaped("<script>\\x1b[2J")
        '&lt;script&gt;\\\\x1b[2J'
    """
    return html.escape(printable(str(text)))


def lines_of(intervention: Intervention) -> list[tuple[str, str]]:
    """The console's lines about an intervention, each with its kind: ``seen``, ``why``, ``done``, ``to do``."""
    seen, *lines = tell(intervention).split("\n")
    return [("seen", seen), *((line.strip().partition(": ")[0], line.partition(": ")[2]) for line in lines)]


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; every cell is escaped."""
    titles = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def interventions_table(interventions: Sequence[Intervention], total: int) -> str:
    """A table of the newest of ``total`` interventions, with their messages."""
    if not total:
        return "<p>No interventions.</p>"
    shown = interventions[-REPORT.interventions_in_table :]
    older = total - len(shown)
    names = ("seen", "why", "sample", "done", "to do")
    described = [dict(lines_of(one)) for one in shown]
    rows = [[parts.get(name) or parts.get(f"{name}s", "") for name in names] for parts in described]
    return table(names, rows) + (f"<p>and {older:,} before these</p>" if older else "")
