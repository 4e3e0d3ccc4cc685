"""The sink that appends records to a file loses none, whatever happens to the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_nanguard.record.files import read_records
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.types import Finding, Intervention
from tests.record.data import ROLLBACK, SKIP, interventions, lines, same, step, steps

FULL = Path("/dev/full")

# Files are made anew inside each example, so a folder shared by the examples does no harm.
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared_folder
@given(records=st.lists(interventions, max_size=4))
def test_round_trip(tmp_path: Path, records: list[Intervention]) -> None:
    """Whatever an intervention holds, what is read equals what was written."""
    path = tmp_path / "records.jsonl"
    path.unlink(missing_ok=True)
    sink = JsonLines(path)
    for record in records:
        sink.write(record)
    read = read_records(path) if records else []
    assert len(read) == len(records)
    assert all(same(one, other) for one, other in zip(read, records, strict=True))


@shared_folder
@given(records=st.lists(interventions, min_size=1, max_size=3), data=st.data())
def test_truncation_loses_the_last_record_at_most(
    tmp_path: Path, records: list[Intervention], data: st.DataObject
) -> None:
    """Cut anywhere, the file gives every record whose line is whole, and the next one gets a line of its own."""
    path = tmp_path / "records.jsonl"
    path.unlink(missing_ok=True)
    sink = JsonLines(path)
    ends = [0]
    for record in records:
        sink.write(record)
        ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    # A line is whole without its newline too.
    whole = sum(end - 1 <= cut for end in ends[1:])
    assert [repr(record) for record in read_records(path)] == [repr(record) for record in records[:whole]]

    JsonLines(path).write(SKIP)
    assert [repr(record) for record in read_records(path)] == [repr(record) for record in [*records[:whole], SKIP]]


def test_writes_one_strict_json_object_a_line(tmp_path: Path) -> None:
    """Other tools read the file: one object a line, plain ASCII, no NaN token."""
    path = tmp_path / "records.jsonl"
    sink = JsonLines(path)
    sink.write(step(1, value=math.nan, place="Gewichte in 层\n", lr_after=-math.inf))
    sink.write(step(2))

    def refuse(token: str) -> None:
        raise AssertionError(token)

    written = path.read_text("ascii").splitlines()
    objects = [json.loads(line, parse_constant=refuse) for line in written]
    assert [found["global_step"] for found in objects] == [1, 2]
    assert objects[0]["schema"] == 1
    assert path.read_bytes().endswith(b"}\n")


def test_folder_is_made_with_the_first_record_only(tmp_path: Path) -> None:
    """A healthy run leaves no folder behind."""
    sink = JsonLines(tmp_path / "a" / "b" / "records.jsonl")
    sink.close()
    assert list(tmp_path.iterdir()) == []
    sink.write(SKIP)
    assert steps(sink.path) == [412]


def test_a_record_waits_for_the_disk_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is in the file when write returns; a burst is synchronised once a second, and at the end."""
    path = tmp_path / "records.jsonl"
    sizes: list[int] = []
    now = 100.0
    monkeypatch.setattr("os.fsync", lambda _: sizes.append(path.stat().st_size))
    monkeypatch.setattr("time.monotonic", lambda: now)
    sink = JsonLines(path)
    sink.write(step(1))
    one = path.stat().st_size
    sink.write(step(2))
    assert steps(path) == [1, 2]
    now += 1.0
    sink.write(step(3))
    sink.write(step(4))
    sink.close()
    sink.close()
    assert sizes == [one, 3 * one, 4 * one]


def test_appends_after_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a killed run left is kept as it is, and costs no record of the next run."""
    path = tmp_path / "records.jsonl"
    JsonLines(path).write(step(1))
    JsonLines(path).write(step(2))
    path.write_bytes(path.read_bytes()[:-20])
    sink = JsonLines(path)
    sink.write(step(3))
    sink.write(step(4))
    assert steps(path) == [1, 3, 4]
    assert len(path.read_bytes().splitlines()) == 4
    assert len(caplog.records) == 1
    assert "line 2" in lines(caplog)[0]


def test_unwritable_folder_keeps_records_and_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the folder cannot be made records wait; once it can they are written in order, none twice."""
    blocker = tmp_path / "logs"
    blocker.write_text("a file where a folder is needed")
    sink = JsonLines(blocker / "records.jsonl")
    for number in range(3):
        sink.write(step(number))
    assert len(caplog.records) == 1
    assert str(sink.path) in lines(caplog)[0]
    assert "Training goes on" in lines(caplog)[0]
    assert "choose a folder for the next run" in lines(caplog)[0]

    blocker.unlink()
    sink.write(step(3))
    sink.close()
    assert steps(sink.path) == [0, 1, 2, 3]
    assert len(caplog.records) == 1


def test_close_tries_again_and_tells_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end of fit is the last try; records that cannot be written then are counted, dropped ones too."""
    blocker = tmp_path / "logs"
    blocker.touch()
    sink = JsonLines(blocker / "records.jsonl", RecordsThresholds(records_waiting_for_file=2))
    for number in range(5):
        sink.write(step(number))
    caplog.clear()
    sink.close()
    assert "5 of its records could not be written" in lines(caplog)[0]
    blocker.unlink()
    sink.close()
    assert steps(sink.path) == [3, 4]
    assert "3 older records were lost" in lines(caplog)[1]


def test_a_file_does_not_grow_without_end(tmp_path: Path) -> None:
    """One that is full is put aside in the place of the one before; what is read is the newest, in order."""
    sink = JsonLines(tmp_path / "records.jsonl", RecordsThresholds(bytes_per_file=2000))
    for number in range(100):
        sink.write(step(number))
    assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "records.1.jsonl"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 2000 + 2 * 500
    kept = steps(sink.path)
    assert kept == list(range(100 - len(kept), 100))
    assert len(kept) > 4


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning says that it is a file, and does not speak of the space on the disk."""
    (tmp_path / "runs").write_text("a file")
    JsonLines(tmp_path / "runs" / "one" / "records.jsonl").write(SKIP)
    assert lines(caplog)[0].endswith(f"{tmp_path / 'runs'} is a file: choose a folder for the next run.")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_full_disk_does_not_end_training(caplog: pytest.LogCaptureFixture) -> None:
    """A disk without space is one warning."""
    sink = JsonLines(FULL)
    sink.write(SKIP)
    sink.write(ROLLBACK)
    assert ["No space left" in line for line in lines(caplog)] == [True]
    assert "Free space on the disk" in lines(caplog)[0]


@pytest.mark.parametrize("error", [OSError("disk quota exceeded"), KeyboardInterrupt()])
def test_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A record that may not last is taken back, and is there once after the next try."""
    path = tmp_path / "records.jsonl"
    sink = JsonLines(path)
    sink.write(step(1))
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        patch.setattr("time.monotonic", lambda: math.inf)
        if isinstance(error, OSError):
            sink.write(step(2))
        else:
            with pytest.raises(KeyboardInterrupt, match=r"^$"):
                sink.write(step(2))
    assert path.read_bytes() == before
    sink.write(step(3))
    assert steps(path) == [1, 2, 3]


def test_evidence_of_foreign_types_is_written(tmp_path: Path) -> None:
    """NumPy scalars and tensors among the evidence become numbers, anything else its text."""
    numpy = pytest.importorskip("numpy")
    evidence: Any = {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": numpy.float32("nan"), "d": {1}, "e": b"x"}
    evidence["f"] = numpy.zeros(2)
    sink = JsonLines(tmp_path / "records.jsonl")
    sink.write(replace(SKIP, finding=Finding("cause", 1.0, evidence)))
    (record,) = read_records(sink.path)
    assert record.finding is not None
    kept = dict(record.finding.evidence)
    assert (kept["a"], kept["b"], kept["d"], kept["e"]) == (0.5, 3, "{1}", "b'x'")
    assert math.isnan(kept["c"])


def test_rejects_an_empty_memory(tmp_path: Path) -> None:
    """A wrong argument is named with its value."""
    with pytest.raises(ValueError, match="records_waiting_for_file=0"):
        JsonLines(tmp_path / "x", RecordsThresholds(records_waiting_for_file=0))
