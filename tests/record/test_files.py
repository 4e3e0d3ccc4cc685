"""Files of records are read as far as they can be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_nanguard.record.files import append, read_records, readable
from tests.record.data import SKIP, lines


def test_missing_file(tmp_path: Path) -> None:
    """A path that leads nowhere is the caller's mistake."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        read_records(tmp_path / "nothing.jsonl")


def test_healthy_file_is_read_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged for a whole file, blank lines and Windows line ends included."""
    line = json.dumps(SKIP.to_dict()).encode()
    path = tmp_path / "records.jsonl"
    path.write_bytes(line + b"\r\n\n" + line + b"\n  \n" + line)
    assert read_records(path) == [SKIP] * 3
    assert not caplog.records


@pytest.mark.parametrize(
    "junk",
    [
        b'{"schema": 1, "global_',
        b"\xff\xfe\x00garbage\x80",
        b"\0" * 64,
        b"[]",
        b"7",
        b'"text"',
        b"null",
        b"{}",
        b'{"remedies": null}',
        b"[" * 100_000,
        json.dumps({**SKIP.to_dict(), "finding": [1]}).encode(),
        json.dumps({**SKIP.to_dict(), "finding": {"place": "loss"}}).encode(),
        json.dumps({**SKIP.to_dict(), "finding": {"cause": "x", "confidence": 1, "evidence": 3}}).encode(),
    ],
)
def test_unreadable_lines_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    """The warning names the file and the lines; records around them are read."""
    good = json.dumps(SKIP.to_dict()).encode()
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join([good, junk, good, junk, good]) + b"\n")
    assert read_records(path) == [SKIP] * 3
    assert len(caplog.records) == 1
    assert str(path) in lines(caplog)[0]
    assert "lines 2, 4 " in lines(caplog)[0]
    assert "the other records are complete" in lines(caplog)[0]


def test_many_unreadable_lines_are_one_short_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of another kind does not flood the log."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"junk\n" * 1234)
    assert read_records(path) == []
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8 and 1,226 more" in lines(caplog)[0]
    assert "no line of it is a record, so the file is damaged" in lines(caplog)[0]


def test_later_version_is_read_as_far_as_it_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields added later are passed over, in the finding too."""
    finding = {"cause": "bad", "confidence": 0.5, "evidence": {"ratio": "NaN"}, "new": 1}
    later = {**SKIP.to_dict(), "schema": 9, "new": [1], "finding": finding}
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(later) + "\n")
    (record,) = read_records(path)
    assert record.global_step == 412
    assert record.finding is not None
    assert math.isnan(float(record.finding.evidence["ratio"]))
    assert not caplog.records


def test_unreadable_later_version_asks_for_an_update(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A record that changed beyond reading is told apart from a torn line."""
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": 9, "step": 1}\n')
    assert read_records(path) == []
    assert "update lightning-nanguard" in lines(caplog)[0]


def test_lines_are_added_after_a_torn_one(tmp_path: Path) -> None:
    """The torn line costs no other line, and a whole one is followed without a blank line."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'1\n{"a": ')
    for added in (b"2\n", b"3\n4\n"):
        with open(path, "a+b", buffering=0) as file:
            append(file, added)
    assert path.read_bytes() == b'1\n{"a": \n2\n3\n4\n'
    assert readable(path.read_bytes(), int) == [1, 2, 3, 4]
