"""Samples of findings in words."""

from __future__ import annotations

from dataclasses import replace

from lightning_nanguard.record.messages import describe_finding, tell, tell_again
from lightning_nanguard.record.sample_words import origin_in_words, samples_in_words
from lightning_nanguard.types import Finding, Intervention

ROWS = Finding("non_finite_input", 1.0, {"times_met": 2.0}, "field 0", (4, 6), "Clean the data.", "batch", (100, "a"))
STREAM = replace(ROWS, samples=(4,), rows=(), evidence={"position": 12.0, "hash": "ab12", "rank": 1.0})


def test_where_samples_came_from() -> None:
    """Rows where they are known, else place and hash; how often, and on which rank."""
    assert origin_in_words(ROWS) == "rows 100, a of the data set, seen up to 2 times"
    assert origin_in_words(STREAM) == "batch 12 of the epoch, hash ab12, on rank 1"
    assert samples_in_words(STREAM) == "sample 4, batch 12 of the epoch, hash ab12, on rank 1"
    assert origin_in_words(replace(STREAM, evidence={"position": 12.0, "hash": ""})) == "batch 12 of the epoch"
    assert origin_in_words(Finding("dead_relu", 1.0, {"hash": "of the user's own rule"})) == ""


def test_messages_name_the_rows() -> None:
    """The console says the rows the first time and again, and so does advice."""
    told = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1, finding=ROWS)
    assert "\n  samples: rows 100, a of the data set, seen up to 2 times\n" in tell(told)
    assert "again (rows 100, a of the data set, seen up to 2 times); skipped" in tell_again(told)
    assert "(rows 100, a of the data set, seen up to 2 times)" in describe_finding(ROWS)
