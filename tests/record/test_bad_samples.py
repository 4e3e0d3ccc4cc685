"""Bad samples are counted, written, read and told."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard.record.bad_samples import (
    BadSample,
    KnownSamples,
    describe_sample,
    merged,
    read_bad_samples,
    write_csv,
)
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.thresholds.records import RecordsThresholds


def test_counts_and_leaves_out() -> None:
    """Each sample is counted by its row or hash; with quarantine it is left out from then on."""
    known = KnownSamples(quarantine=True)
    assert [known.met(7), known.met("hash ab"), known.met(7), known.times(7), known.times(8)] == [1, 1, 2, 2, 0]
    assert (known.left_out, known.hashes) == ({7}, {"ab"})
    assert KnownSamples().met(7) == 1


def test_state_goes_on() -> None:
    """A resumed run counts on, and leaves out what its first part met where it is asked to."""
    known = KnownSamples()
    known.met(7)
    known.met("cat.png")
    resumed, plain = KnownSamples(quarantine=True), KnownSamples()
    for one in (resumed, plain):
        one.load_state_dict(known.state_dict())
        assert one.met(7) == 2
    assert resumed.left_out == {7, "cat.png"}
    assert plain.left_out == set()
    resumed.load_state_dict({})
    assert resumed.times(7) == 2


ONE = BadSample("not finite", 100, "ab12", {"x": (1, 2), "y": ()}, 1, 6, 4, 0, 30, run="r")


def test_goes_to_a_file_and_back(tmp_path: Path) -> None:
    """What is written is read again; half a line of a killed run is left out."""
    sink = JsonLines(tmp_path / "bad_samples.jsonl")
    sink.write(ONE)
    sink.write(replace(ONE, row="cat.png"))
    sink.close()
    with sink.path.open("a") as file:
        file.write('[1]\n{"cause": "ha')
    assert read_bad_samples(sink.path) == [ONE, replace(ONE, row="cat.png")]


def test_a_file_that_was_put_aside_is_read_too(tmp_path: Path) -> None:
    """Samples of a file that was full come before those of the one that took its place."""
    sink = JsonLines(tmp_path / "bad_samples.jsonl", RecordsThresholds(bytes_per_file=1))
    sink.write(ONE)
    sink.write(replace(ONE, row=7))
    assert [one.row for one in read_bad_samples(sink.path)] == [100, 7]


def test_a_record_of_something_else_is_refused() -> None:
    """A line without a cause says what it holds."""
    with pytest.raises(ValueError, match=r"not a record of a bad sample: .*its keys are \['row'\]"):
        BadSample.from_dict({"row": 1})
    assert json.loads(json.dumps(ONE.to_dict()))["schema"] == 1


def test_each_sample_once_in_the_order_of_rows() -> None:
    """A sample that was met again is listed as first met, with how often; those without rows come last."""
    stream = replace(ONE, row=None, hash="cd")
    met = [stream, ONE, replace(ONE, row=7), replace(ONE, epoch=2, times=2), replace(stream, times=3, batch=9)]
    assert merged(met) == [replace(ONE, row=7), replace(ONE, times=2), replace(stream, times=3)]


def test_told_in_one_line() -> None:
    """Row or hash, cause, columns, how often and where."""
    assert describe_sample(replace(ONE, times=2, rank=1)) == (
        "row 100: not finite in field x, columns 1, 2; field y; "
        "seen 2 times, first at step 30, epoch 1, batch 6, sample 4, rank 1"
    )
    assert describe_sample(BadSample("unknown_operation", hash="ab")) == (
        "sample with hash ab: unknown_operation; seen at step 0, epoch 0, batch 0, sample 0"
    )
    assert "batch 6 (batch 0 since the loader began anew)" in describe_sample(replace(ONE, position=0, batch=6))


def test_csv() -> None:
    """A spreadsheet reads one line a sample, with a header."""
    file = io.StringIO()
    write_csv([ONE, replace(ONE, row=None, columns={})], file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["row"], row["cause"], row["columns"], row["hash"]) for row in rows] == [
        ("100", "not finite", "x: 1 2; y:", "ab12"),
        ("", "not finite", "", "ab12"),
    ]
