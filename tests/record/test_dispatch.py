"""Every sink of a fit gets every record, whatever another one does or however slow it is."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.record.base import CallableSink, RunInfo, Sink
from lightning_nanguard.record.dispatch import BackgroundSink, IsolatedSink, SinkDispatcher
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.types import Intervention
from tests.record.data import SKIP, Broken, lines, step


class Interrupted(Sink):
    """The user pressed Ctrl-C while it wrote."""

    def write(self, intervention: Intervention) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        raise SystemExit(3)


class Called:
    """An object that can be called."""

    def __call__(self, intervention: Intervention) -> None:
        pass


def test_missed_records_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure is logged with its name, the number of missed records at the end."""
    sink = IsolatedSink(Broken())
    for _ in range(3):
        sink.write(SKIP)
    assert "tests.record.data.Broken could not take a record: RuntimeError: no connection" in lines(caplog)[0]
    assert len(caplog.records) == 1
    caplog.clear()
    sink.close()
    assert "Broken missed 3 records" in lines(caplog)[0]
    assert "could not be closed: ConnectionError: still none" in lines(caplog)[1]


def test_interrupt_goes_through() -> None:
    """Ctrl-C and an exit are no fault of a sink in the thread that trains; in another one they are."""
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        IsolatedSink(Interrupted()).write(SKIP)
    with pytest.raises(SystemExit, match="3"):
        IsolatedSink(Interrupted()).close()
    IsolatedSink(Interrupted(), catches=BaseException).close()


@pytest.mark.parametrize(
    ("sink", "name"),
    [
        (Broken(), "tests.record.data.Broken"),
        (CallableSink(lines), "tests.record.data.lines"),
        (CallableSink([].append), "builtins.list.append"),
        (CallableSink(print), "builtins.print"),
        (CallableSink(Called()), "tests.record.test_dispatch.Called"),
        (CallableSink(partial(print, "!")), "functools.partial"),
    ],
)
def test_name(sink: Sink, name: str) -> None:
    """Messages call a sink by its class, or by the function it calls."""
    assert IsolatedSink(sink).name == name


class Slow(Sink):
    """Waits, in each of its calls, until it is let through; it notes what it was asked and in which thread."""

    def __init__(self, *blocked: str) -> None:
        self.blocked = blocked
        self.entered = threading.Event()
        self.released = threading.Event()
        self.asked: list[Any] = []
        self.threads: set[threading.Thread] = set()

    def _wait(self, call: str) -> None:
        self.threads.add(threading.current_thread())
        if call in self.blocked:
            self.entered.set()
            assert self.released.wait(60)

    def open(self, run: RunInfo) -> None:
        self._wait("open")
        self.asked.append(run)

    def write(self, intervention: Intervention) -> None:
        self._wait("write")
        self.asked.append(intervention.global_step)

    def close(self) -> None:
        self._wait("close")
        self.asked.append("close")

    def let_through(self) -> None:
        """Release it, and wait for its thread."""
        self.released.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def background(sink: Sink, seconds: float = 60.0, most: int = 100) -> BackgroundSink:
    return BackgroundSink(sink, seconds, RecordsThresholds(records_waiting_in_background=most))


def test_everything_happens_in_one_thread_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Open, every record in order, and close: in one daemon thread, which has ended when close returns."""
    sink, run = Slow(), RunInfo(dirpath=Path("records"))
    running = background(sink)
    running.open(run)
    for number in range(50):
        running.write(step(number))
    running.close()
    assert sink.asked == [run, *range(50), "close"]
    (thread,) = sink.threads
    assert thread.daemon
    assert not thread.is_alive()
    assert not caplog.records
    running.close()
    assert not caplog.records


def test_a_full_queue_drops_the_oldest(caplog: pytest.LogCaptureFixture) -> None:
    """While the sink hangs nobody waits; the newest records are kept, and the number of dropped ones is told."""
    sink = Slow("write")
    running = background(sink, most=3)
    running.open(RunInfo())
    running.write(step(0))
    assert sink.entered.wait(60)
    for number in range(1, 8):
        running.write(step(number))
    sink.released.set()
    running.close()
    assert sink.asked[1:] == [0, 5, 6, 7, "close"]
    assert "Slow did not write 4 records: 4 dropped because too many were waiting." in lines(caplog)[0]
    assert len(caplog.records) == 1


def test_close_waits_no_longer_than_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """What is not written by then is counted, the record at hand too; the sink is asked nothing more afterwards."""
    sink = Slow("write")
    running = background(sink, 0.05)
    running.open(RunInfo())
    for number in range(4):
        running.write(step(number))
    assert sink.entered.wait(60)
    running.close()
    assert "Slow did not write 4 records: 4 still to be written after its timeout of 0.05 s." in lines(caplog)[0]
    sink.let_through()
    assert sink.asked[1:] == [0]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("blocked", "said"), [("open", "1 still to be written"), ("close", "was not closed within")])
def test_hanging_in_open_or_close(blocked: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """A sink that cannot connect or disconnect holds nobody up either."""
    sink = Slow(blocked)
    running = background(sink, 0.05)
    running.open(RunInfo())
    running.write(step(0))
    running.close()
    assert [said in line for line in lines(caplog)] == [True]
    sink.let_through()


@pytest.mark.parametrize("error", [RuntimeError("no connection"), SystemExit(3)])
def test_what_it_raises_is_logged_once(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """A sink that raises is logged by name, also where it wants to exit, and is asked again with the next record."""

    class Fails(Slow):
        def write(self, intervention: Intervention) -> None:
            super().write(intervention)
            raise error

    sink = Fails()
    running = background(sink)
    running.open(RunInfo())
    for number in range(3):
        running.write(step(number))
    running.close()
    assert sink.asked[1:] == [0, 1, 2, "close"]
    assert f"Fails could not take a record: {type(error).__name__}: {error}" in lines(caplog)[0]
    assert "Fails missed 3 records" in lines(caplog)[1]
    assert len(caplog.records) == 2


def test_rejects_no_room() -> None:
    """A queue without room is refused by name."""
    with pytest.raises(ValueError, match="records_waiting_in_background=0"):
        background(Slow(), most=0)


class Closes(Sink):
    """Notes what it is asked."""

    def __init__(self, every_rank: bool = False) -> None:
        self.every_rank = every_rank
        self.asked: list[Any] = []

    def open(self, run: RunInfo) -> None:
        self.asked.append(run)

    def write(self, intervention: Intervention) -> None:
        self.asked.append(intervention)

    def close(self) -> None:
        self.asked.append("close")


def test_broken_sink_keeps_the_record_from_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Sinks before and after the broken one get every record; its fault is logged once, with its name."""
    before, after = Memory(), Memory()
    dispatcher = SinkDispatcher([before, Broken(), after], RunInfo())
    for number in range(5):
        dispatcher.write(step(number))
    assert before == after
    assert before.total == 5
    assert len(caplog.records) == 1
    assert "Broken could not take a record: RuntimeError: no connection" in lines(caplog)[0]
    assert caplog.records[0].exc_info


def test_all_are_opened_and_closed(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that can be neither opened nor closed keeps no other from it."""
    run, sink = RunInfo(dirpath=Path("records")), Closes()
    dispatcher = SinkDispatcher([Broken(), sink], run)
    dispatcher.open()
    for _ in range(3):
        dispatcher.write(SKIP)
    dispatcher.close()
    assert sink.asked == [run, SKIP, SKIP, SKIP, "close"]
    assert ["could not be opened" in lines(caplog)[0], "missed 3 records" in lines(caplog)[1]] == [True, True]
    assert "could not be closed: ConnectionError: still none" in lines(caplog)[2]
    assert len(caplog.records) == 3


def test_each_broken_sink_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Two sinks of one class are two sinks."""
    SinkDispatcher([Broken(), Broken()], RunInfo()).write(SKIP)
    assert len(caplog.records) == 2


def test_ranks() -> None:
    """On other ranks than 0 only the sinks that ask for every rank are used."""
    for rank, used in ((0, [3, 3]), (1, [0, 3])):
        sinks = [Closes(), Closes(every_rank=True)]
        dispatcher = SinkDispatcher(sinks, RunInfo(rank, 2))
        dispatcher.open()
        dispatcher.write(SKIP)
        dispatcher.close()
        assert [len(sink.asked) for sink in sinks] == used


def test_a_slow_sink_has_a_thread_of_its_own() -> None:
    """A sink with a timeout is called from another thread, which ends with the fit."""
    threads: list[threading.Thread] = []

    class Slow(Sink):
        timeout = 30.0

        def write(self, intervention: Intervention) -> None:
            threads.append(threading.current_thread())

    dispatcher = SinkDispatcher([Slow()], RunInfo())
    dispatcher.open()
    dispatcher.write(SKIP)
    dispatcher.close()
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not thread.is_alive()
