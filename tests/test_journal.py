from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.console import Console
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.files import read_records
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.record.messages import describe
from lightning_nanguard.record.summary import summary
from lightning_nanguard.types import Finding, Intervention

SKIP = Intervention(412, 3, 12, "non_finite_gradient", "gradient of net.0.weight", ("skip",), 0.1, 0.1)
ROLLBACK = Intervention(430, 3, 30, "exploding_loss", "loss", ("restore", "scale"), 0.1, 0.05, snapshot_step=400)
FULL = Path("/dev/full")

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**70), 2**70)
texts = st.text(st.characters(), max_size=30) | st.sampled_from(["NaN", "Infinity", "-Infinity", "\ud800", "\0", "\n"])
# Evidence says "NaN" for the number, so this one word cannot be a text there.
evidence_texts = texts.filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
findings = st.builds(
    Finding,
    cause=texts,
    confidence=numbers,
    evidence=st.dictionaries(texts, numbers | evidence_texts, max_size=3),
    place=texts,
    samples=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    suggestion=texts,
)
interventions = st.builds(
    Intervention,
    global_step=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    batch_idx=st.integers(-1, 10**9),
    fault=texts,
    place=texts,
    remedies=st.lists(texts | st.sampled_from(["skip", "restore", "scale", "stop"]), max_size=3).map(tuple),
    lr_before=st.none() | numbers,
    lr_after=st.none() | numbers,
    snapshot_step=st.none() | st.integers(0, 2**63),
    cause=st.none() | texts,
    finding=st.none() | findings,
    message=texts,
    value=st.none() | numbers,
    applied=st.booleans(),
)
# Files are made anew inside each example, so a folder shared by the examples does no harm.
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def same(one: Any, other: Any) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(one) == repr(other) and type(one) is type(other)


def step(number: int, **changes: Any) -> Intervention:
    return replace(SKIP, global_step=number, **changes)


def steps(path: Path) -> list[int]:
    return [record.global_step for record in read_records(path)]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_import_needs_no_torch() -> None:
    """Records can be read where torch and Lightning are not even installed."""
    code = (
        "import sys; import lightning_nanguard.record.dispatch; "
        "heavy = {'torch', 'numpy', 'lightning', 'pytorch_lightning', 'torchmetrics'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


class TestJsonLines:
    @shared_folder
    @given(records=st.lists(interventions, max_size=4))
    def test_round_trip(self, tmp_path: Path, records: list[Intervention]) -> None:
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
        self, tmp_path: Path, records: list[Intervention], data: st.DataObject
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

    def test_writes_one_strict_json_object_a_line(self, tmp_path: Path) -> None:
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

    def test_folder_is_made_with_the_first_record_only(self, tmp_path: Path) -> None:
        """A healthy run leaves no folder behind."""
        sink = JsonLines(tmp_path / "a" / "b" / "records.jsonl")
        sink.close()
        assert list(tmp_path.iterdir()) == []
        sink.write(SKIP)
        assert steps(sink.path) == [412]

    def test_a_record_waits_for_the_disk_once_a_second(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_appends_after_a_torn_line(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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

    def test_unwritable_folder_keeps_records_and_warns_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """While the folder cannot be made records wait; once it can they are written in order, none twice."""
        blocker = tmp_path / "logs"
        blocker.write_text("a file where a folder is needed")
        sink = JsonLines(blocker / "records.jsonl")
        for number in range(3):
            sink.write(step(number))
        assert len(caplog.records) == 1
        assert str(sink.path) in lines(caplog)[0]
        assert "Training goes on" in lines(caplog)[0]
        assert "choose another folder" in lines(caplog)[0]

        blocker.unlink()
        sink.write(step(3))
        sink.close()
        assert steps(sink.path) == [0, 1, 2, 3]
        assert len(caplog.records) == 1

    def test_close_tries_again_and_tells_what_is_lost(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The end of fit is the last try; records that cannot be written then are counted, dropped ones too."""
        blocker = tmp_path / "logs"
        blocker.touch()
        sink = JsonLines(blocker / "records.jsonl", max_kept=2)
        for number in range(5):
            sink.write(step(number))
        caplog.clear()
        sink.close()
        assert "5 of its records could not be written" in lines(caplog)[0]
        blocker.unlink()
        sink.close()
        assert steps(sink.path) == [3, 4]
        assert "3 older records were lost" in lines(caplog)[1]

    @pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
    def test_full_disk_does_not_end_training(self, caplog: pytest.LogCaptureFixture) -> None:
        """A disk without space is one warning."""
        sink = JsonLines(FULL)
        sink.write(SKIP)
        sink.write(ROLLBACK)
        assert ["No space left" in line for line in lines(caplog)] == [True]

    @pytest.mark.parametrize("error", [OSError("disk quota exceeded"), KeyboardInterrupt()])
    def test_failed_write_leaves_the_file_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
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

    def test_evidence_of_foreign_types_is_written(self, tmp_path: Path) -> None:
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

    def test_rejects_an_empty_memory(self, tmp_path: Path) -> None:
        """A wrong argument is named with its value."""
        with pytest.raises(ValueError, match="max_kept=0"):
            JsonLines(tmp_path / "x", max_kept=0)


class TestReadRecords:
    def test_missing_file(self, tmp_path: Path) -> None:
        """A path that leads nowhere is the caller's mistake."""
        with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
            read_records(tmp_path / "nothing.jsonl")

    def test_healthy_file_is_read_in_silence(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
    ) -> None:
        """The warning names the file and the lines; records around them are read."""
        good = json.dumps(SKIP.to_dict()).encode()
        path = tmp_path / "records.jsonl"
        path.write_bytes(b"\n".join([good, junk, good, junk, good]) + b"\n")
        assert read_records(path) == [SKIP] * 3
        assert len(caplog.records) == 1
        assert str(path) in lines(caplog)[0]
        assert "lines 2, 4," in lines(caplog)[0]

    def test_many_unreadable_lines_are_one_short_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A file of another kind does not flood the log."""
        path = tmp_path / "records.jsonl"
        path.write_bytes(b"junk\n" * 1234)
        assert read_records(path) == []
        assert "lines 1, 2, 3, 4, 5, 6, 7, 8 and 1,226 more" in lines(caplog)[0]

    def test_later_version_is_read_as_far_as_it_is_known(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
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

    def test_unreadable_later_version_asks_for_an_update(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A record that changed beyond reading is told apart from a torn line."""
        path = tmp_path / "records.jsonl"
        path.write_text('{"schema": 9, "step": 1}\n')
        assert read_records(path) == []
        assert "update lightning-nanguard" in lines(caplog)[0]


class TestConsole:
    def shown(self, caplog: pytest.LogCaptureFixture) -> list[int]:
        return [int(line.split()[2]) for line in lines(caplog)]

    def test_speaks_through_the_logger(self, caplog: pytest.LogCaptureFixture) -> None:
        """One warning of the logger lightning_nanguard, no Python warning."""
        Console().write(SKIP)
        assert caplog.record_tuples == [("lightning_nanguard", logging.WARNING, f"NaNGuard: {describe(SKIP)}")]

    def test_thins_out_by_doubling(self, caplog: pytest.LogCaptureFixture) -> None:
        """Ten are shown, then the 20th, 40th, 80th …, each with the number left out."""
        console = Console()
        for number in range(1, 101):
            console.write(step(number))
        assert self.shown(caplog) == [*range(1, 11), 20, 40, 80]
        assert "ever more rarely" in lines(caplog)[9]
        assert [line.rpartition("(and ")[2].split()[0] for line in lines(caplog)[10:]] == ["9", "19", "39"]
        caplog.clear()
        console.close()
        assert lines(caplog) == ["NaNGuard: 87 of 100 interventions were not shown here."]

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        show_first=st.integers(1, 12),
        kinds=st.lists(st.sampled_from(["a", "b", "stop"]), max_size=120),
    )
    def test_nothing_is_lost_in_total(
        self, caplog: pytest.LogCaptureFixture, show_first: int, kinds: list[str]
    ) -> None:
        """Lines shown and numbers left out add up to all interventions, and stops are always shown."""
        caplog.clear()
        console = Console(show_first=show_first)
        for number, kind in enumerate(kinds):
            console.write(step(number, fault=kind, remedies=("stop",) if kind == "stop" else ("skip",)))
        shown = len(caplog.records)
        assert sum("; stopped the run" in line for line in lines(caplog)) == kinds.count("stop")
        console.close()
        hidden = int(lines(caplog)[-1].split()[1]) if len(caplog.records) > shown else 0
        assert shown + hidden == len(kinds)
        assert shown <= kinds.count("stop") + 2 * (show_first + 8)

    def test_rare_kind_is_shown_among_many_of_another(self, caplog: pytest.LogCaptureFixture) -> None:
        """A thousand skipped batches do not hide the rollback that follows."""
        console = Console(show_first=5)
        for number in range(1000):
            console.write(step(number))
        caplog.clear()
        console.write(ROLLBACK)
        assert self.shown(caplog) == [430]

    def test_stop_is_always_shown(self, caplog: pytest.LogCaptureFixture) -> None:
        """The intervention that ends the run is never left out, and the thinning goes on around it."""
        console = Console(show_first=1)
        for number in range(1, 8):
            console.write(step(number, remedies=("stop",)))
        assert self.shown(caplog) == list(range(1, 8))
        caplog.clear()
        console.close()
        assert not caplog.records

    def test_close_starts_anew(self, caplog: pytest.LogCaptureFixture) -> None:
        """A second fit is shown like a first one; closing twice says nothing twice."""
        console = Console(show_first=1)
        for _ in range(3):
            console.write(SKIP)
        console.close()
        caplog.clear()
        console.close()
        assert not caplog.records
        console.write(SKIP)
        assert len(caplog.records) == 1

    def test_other_ranks_are_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        """Only rank zero speaks, also at the end."""
        console = Console(rank_zero=False, show_first=1)
        for _ in range(5):
            console.write(SKIP)
        console.close()
        assert not caplog.records

    def test_rejects_showing_nothing(self) -> None:
        """A wrong argument is named with its value."""
        with pytest.raises(ValueError, match="show_first=0"):
            Console(show_first=0)


class TestDescribe:
    FINDING = Finding("non_finite_input", 1.0, {}, "input", (3, 17), "clean the data set")

    @pytest.mark.parametrize(
        ("intervention", "text"),
        [
            (
                SKIP,
                "step 412 (epoch 3, batch 12): non_finite_gradient in gradient of net.0.weight; skipped the batch",
            ),
            (
                ROLLBACK,
                "step 430 (epoch 3, batch 30): exploding_loss in loss; went back to step 400, learning rate 0.1 → 0.05",
            ),
            (
                replace(ROLLBACK, applied=False),
                (
                    "step 430 (epoch 3, batch 30): exploding_loss in loss; would have gone back to step 400, changed "
                    "the learning rate 0.1 → 0.05"
                ),
            ),
            (
                replace(ROLLBACK, applied=False, lr_after=0.1, batch_idx=-1, value=12345.678),
                (
                    "step 430 (epoch 3): exploding_loss in loss (1.235e+04); would have gone back to step 400, changed "
                    "the learning rate"
                ),
            ),
            (
                replace(ROLLBACK, lr_before=None, lr_after=None, snapshot_step=None),
                (
                    "step 430 (epoch 3, batch 30): exploding_loss in loss; went back to an earlier state, learning "
                    "rate changed"
                ),
            ),
            (
                replace(ROLLBACK, remedies=("restore", "clip", "reset moments", "stop"), lr_after=0.1),
                (
                    "step 430 (epoch 3, batch 30): exploding_loss in loss; went back to step 400, turned gradient "
                    "clipping on, emptied the optimizer's state, stopped the run"
                ),
            ),
            (
                replace(ROLLBACK, remedies=("reduce {momentum}",)),
                "step 430 (epoch 3, batch 30): exploding_loss in loss; reduce {momentum}, learning rate 0.1 → 0.05",
            ),
            (
                replace(SKIP, place="", remedies=(), value=1.0, message="the norm is\n40 times the median. "),
                "step 412 (epoch 3, batch 12): non_finite_gradient (the norm is 40 times the median); did nothing",
            ),
            (
                replace(SKIP, remedies=(), applied=False, place="", cause="bad_label"),
                "step 412 (epoch 3, batch 12): non_finite_gradient; would have done nothing; cause: bad_label",
            ),
            (
                replace(SKIP, cause="non_finite_input", finding=FINDING),
                (
                    "step 412 (epoch 3, batch 12): non_finite_gradient in gradient of net.0.weight; skipped the batch; "
                    "cause: non_finite_input in input (samples 3, 17): clean the data set"
                ),
            ),
        ],
    )
    def test_text(self, intervention: Intervention, text: str) -> None:
        """Step, place, what was done and why, in one sentence."""
        assert describe(intervention) == text

    @given(interventions)
    def test_is_one_line_for_anything(self, intervention: Intervention) -> None:
        """Whatever the names hold, there is one line that starts with the step."""
        text = describe(intervention)
        assert len(text.splitlines()) == 1
        assert text.startswith(f"step {intervention.global_step} (epoch {intervention.epoch}")


class TestMemory:
    def filled(self, count: int, maxlen: int = 3) -> Memory:
        memory = Memory(maxlen)
        for number in range(count):
            memory.write(step(number))
        return memory

    @given(count=st.integers(0, 8), maxlen=st.integers(1, 5), index=st.integers(-9, 9), stop=st.integers(-9, 9))
    def test_reads_like_a_tuple(self, count: int, maxlen: int, index: int, stop: int) -> None:
        """Length, index, slice, iteration, containment and equality are those of the newest records."""
        memory = self.filled(count, maxlen)
        newest = tuple(step(number) for number in range(count))[-maxlen:]
        assert (len(memory), tuple(memory), bool(memory)) == (len(newest), newest, bool(newest))
        assert memory[index:stop] == newest[index:stop]
        assert memory[::-1] == newest[::-1]
        assert list(reversed(memory)) == list(reversed(newest))
        assert memory == newest
        assert memory == list(newest)
        assert memory == self.filled(count, maxlen)
        assert memory != [*newest, SKIP]
        assert (step(count - 1) in memory) == (count > 0)
        if -len(newest) <= index < len(newest):
            assert memory[index] == newest[index]
        else:
            with pytest.raises(IndexError, match="out of range"):
                memory[index]
        assert (memory.total, memory.maxlen) == (count, maxlen)

    def test_counts_survive_what_is_dropped(self) -> None:
        """The counts are over all interventions, and closing keeps them."""
        memory = self.filled(10)
        memory.write(ROLLBACK)
        memory.close()
        assert memory.total == 11
        assert memory.faults == {"non_finite_gradient": 10, "exploding_loss": 1}
        assert memory.remedies == {"skip": 10, "restore": 1, "scale": 1}

    def test_cannot_be_changed_from_outside(self) -> None:
        """It has none of the methods of a list, nor a hash, since the guard changes it."""
        memory: Any = self.filled(2)
        with pytest.raises(TypeError, match="item assignment"):
            memory[0] = SKIP
        with pytest.raises(TypeError, match="unhashable"):
            hash(memory)
        assert not hasattr(memory, "append")
        assert memory != "no sequence of interventions"
        assert memory != 3

    def test_may_be_written_to_while_it_is_read(self) -> None:
        """A loop over it sees what was there when it began."""
        memory = self.filled(3)
        for _ in memory:
            memory.write(SKIP)
        assert memory.total == 6

    def test_repr(self) -> None:
        """It shows its records and how many are gone."""
        assert repr(self.filled(1)) == f"Memory([{step(0)!r}])"
        assert repr(self.filled(4)).endswith("], and 1 older)")

    def test_rejects_no_room(self) -> None:
        """A wrong argument is named with its value."""
        with pytest.raises(ValueError, match="maxlen=0"):
            Memory(0)


class Broken(Sink):
    """Fails at whatever it is asked."""

    def write(self, intervention: Intervention) -> None:
        raise RuntimeError("no connection")

    def close(self) -> None:
        raise ConnectionError("still none")


class Interrupted(Sink):
    """The user pressed Ctrl-C while it wrote."""

    def write(self, intervention: Intervention) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        raise SystemExit(3)


class TestJournal:
    def test_broken_sink_keeps_the_record_from_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        """Sinks before and after the broken one get every record; its fault is logged once, with its name."""
        before, after = Memory(), Memory()
        journal = SinkDispatcher([before, Broken(), after])
        for number in range(5):
            journal.write(step(number))
        assert before == after
        assert before.total == 5
        assert len(caplog.records) == 1
        assert "Broken could not take a record: RuntimeError: no connection" in lines(caplog)[0]
        assert caplog.records[0].exc_info

    def test_close_closes_all_and_tells_what_was_missed(self, caplog: pytest.LogCaptureFixture) -> None:
        """A sink that cannot be closed does not keep the others open."""
        closed: list[str] = []

        class Closes(Sink):
            def write(self, intervention: Intervention) -> None: ...

            def close(self) -> None:
                closed.append("yes")

        journal = SinkDispatcher([Broken(), Closes()])
        for _ in range(3):
            journal.write(SKIP)
        caplog.clear()
        journal.close()
        assert closed == ["yes"]
        assert "Broken missed 3 records" in lines(caplog)[0]
        assert "could not be closed: ConnectionError: still none" in lines(caplog)[1]

    def test_each_broken_sink_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """Two sinks of one class are two sinks."""
        SinkDispatcher([Broken(), Broken()]).write(SKIP)
        assert len(caplog.records) == 2

    def test_interrupt_goes_through(self) -> None:
        """Ctrl-C and an exit are no fault of a sink."""
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            SinkDispatcher([Interrupted()]).write(SKIP)
        with pytest.raises(SystemExit, match="3"):
            SinkDispatcher([Interrupted()]).close()

    def test_wrong_sinks_fail_at_once(self) -> None:
        """What is no sink is refused when the journal is made, not when the first record comes."""
        wrong: Any = [Memory(), print]
        with pytest.raises(TypeError, match="print"):
            SinkDispatcher(wrong)
        single: Any = Console()
        with pytest.raises(TypeError, match="got one"):
            SinkDispatcher(single)

    def test_without_sinks(self) -> None:
        """No sink is fine."""
        journal = SinkDispatcher([])
        journal.write(SKIP)
        journal.close()


class TestSummary:
    @pytest.mark.parametrize(
        ("text", "arguments", "options"),
        [
            ("1,200 updates watched, nothing to do", (1200,), {}),
            ("1 update watched, nothing to do", (1, {}, {}), {"path": "records.jsonl"}),
            (
                "10 updates watched, nothing to do; the learning rate ends at 0.5 times its schedule",
                (10,),
                {"lr_multiplier": 0.5},
            ),
            (
                (
                    "10,000 updates watched, 1,004 interventions (gradient_spike 1,001, collapsed 2, exploding_loss "
                    "1): 1,001 batches skipped, 3 rollbacks, 1 change of the learning rate; the learning rate ends at "
                    "0.25 times its schedule; records in logs/records.jsonl"
                ),
                (
                    10_000,
                    {"exploding_loss": 1, "collapsed": 2, "gradient_spike": 1001},
                    {"scale": 1, "restore": 3, "skip": 1001},
                ),
                {"lr_multiplier": 0.25, "path": Path("logs/records.jsonl")},
            ),
            (
                "5 updates watched, 1 fault found, only observed (spike 1): would have been 1 batch skipped",
                (5, {"spike": 1}, {"skip": 1}),
                {"observe": True},
            ),
            (
                "5 updates watched, 2 interventions (spike 2): 2 × reduce momentum",
                (5, {"spike": 2}, {"reduce momentum": 2}),
                {},
            ),
        ],
    )
    def test_text(self, text: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """One line: how long was watched, what was met, what was done, where it is written."""
        assert summary(*arguments, **options) == f"NaNGuard: {text}"
