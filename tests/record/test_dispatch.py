"""Every sink of a fit gets every record, whatever another one does."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.dispatch import SinkDispatcher
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.types import Intervention
from tests.record.data import SKIP, Broken, lines, step


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
