"""Interventions as HTML, in which nothing of a record is markup."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard import Finding
from lightning_nanguard.record.html import escaped, interventions_table, lines_of, table
from tests.record.data import SKIP


def test_cells_are_text() -> None:
    """Markup and control characters of a name are shown and do nothing."""
    assert escaped('<b>"\x1b') == "&lt;b&gt;&quot;\\x1b"
    assert table(["<h>"], [["<i>", 3]]).count("<i>") == 0


def test_what_was_seen_why_and_done() -> None:
    """The words of the console come by what each says."""
    finding = Finding("dead_relu", 0.9, place="net.1", suggestion="no unit is active: none. Lower the rate.")
    told = dict(lines_of(replace(SKIP, finding=finding)))
    assert told["why"] == "dead relu in net.1: no unit is active: none"
    assert told["done"] == "skipped the batch"
    assert told["to do"] == "Lower the rate."


def test_rows_of_the_data_are_in_the_table() -> None:
    """One row or several, under one title."""
    one = Finding("non_finite_input", 0.9, samples=(3,), rows=(700,), suggestion="it holds NaN. Clean the data.")
    for rows, said in (((700,), "row 700 of the data set"), ((7, 9), "rows 7, 9 of the data set")):
        finding = replace(one, samples=tuple(range(len(rows))), rows=rows)
        assert f"<td>{said}</td>" in interventions_table([replace(SKIP, finding=finding)], 1)


def test_the_newest_are_in_the_table() -> None:
    """The newest are shown, and older ones are counted."""
    text = interventions_table([SKIP] * 30, 50)
    assert text.count("<tr>") == 1 + 20
    assert "and 30 before these" in text
    assert interventions_table([], 0) == "<p>No interventions.</p>"
