"""Messages among processes of one machine, here among threads that hold the ends of the same sockets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.distributed import sockets as lines
from lightning_nanguard.distributed.sockets import SocketChannel, connect

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no such sockets here")


def connected(world: int) -> list[SocketChannel | None]:
    """What each of several threads gets."""
    values: list[list[Any]] = [[] for _ in range(world)]
    meeting = threading.Barrier(world)

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            values[rank].append(value)
            meeting.wait(20)
            return [told[len(values[rank]) - 1] for told in values]

        return gather

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: connect(rank, gather_of(rank)), range(world)))


@pytest.fixture(params=[2, 3])
def ends(request: pytest.FixtureRequest) -> Iterator[list[SocketChannel]]:
    """Lines of each of several ranks."""
    ends = [end for end in connected(request.param) if end is not None]
    assert len(ends) == request.param
    yield ends
    for end in ends:
        end.close()


def test_all_read_the_same(ends: list[SocketChannel]) -> None:
    """Each reads what all posted, in the order of ranks."""
    letters = [end.post(bytes([rank, 7])) for rank, end in enumerate(ends)]
    read = [end.read(letter) for end, letter in zip(ends, letters, strict=True)]
    assert read == [[bytes([rank, 7]) for rank in range(len(ends))]] * len(ends)


def test_a_letter_may_be_read_late_or_never(ends: list[SocketChannel]) -> None:
    """Letters do not depend on the order in which they are read, nor on those that nobody reads."""
    letters = [[end.post(bytes([number])) for number in range(4)] for end in ends]
    for end, own in zip(ends, letters, strict=True):
        assert end.read(own[3]) == [bytes([3])] * len(ends)
        assert end.read(own[1]) == [bytes([1])] * len(ends)


def test_what_nobody_reads_does_not_fill_a_line(ends: list[SocketChannel]) -> None:
    """More is posted, in turn, than a socket holds."""
    data = bytes(100)
    for _ in range(2000):
        letters = [end.post(data) for end in ends]
    assert ends[0].read(letters[0]) == [data] * len(ends)


def test_who_has_gone_is_missed_when_it_is_to_be_heard(ends: list[SocketChannel]) -> None:
    """What was posted before is read; then reading raises, and posting does not."""
    letters = [end.post(b"last") for end in ends]
    ends[-1].close()
    assert ends[0].read(letters[0]) == [b"last"] * len(ends)
    letter, *_ = [end.post(b"more") for end in ends[:-1]]
    with pytest.raises(RuntimeError, match="by peer: rank"):
        ends[0].read(letter)


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that never posts is not waited for without end."""
    monkeypatch.setattr(lines, "_PATIENCE", 0.05)
    one, other = connected(2)
    assert one is not None
    assert other is not None
    with pytest.raises(RuntimeError, match="rank 1 has told nothing"):
        one.read(one.post(b"?"))
    one.close()
    other.close()


def gather_over(pipe: Connection, rank: int) -> Callable[[Any], list[Any]]:
    """How two processes bring their values to each other."""

    def gather(value: Any) -> list[Any]:
        pipe.send(value)
        values = [value, pipe.recv()]
        return values if rank == 0 else values[::-1]

    return gather


def killed_beside_its_worker(pipe: Connection) -> None:
    """Rank 1: it forks a process, as a DataLoader does, which outlives it."""
    line = connect(1, gather_over(pipe, 1))
    assert line is not None
    ready, told = os.pipe()
    if os.fork() == 0:
        os.write(told, b"!")
        pipe.poll(60)  # until the test ends
        os._exit(0)
    os.read(ready, 1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_holds_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is killed is missed at once, though a process forked from it lives on."""
    monkeypatch.setattr(lines, "_PATIENCE", 10.0)
    mine, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=killed_beside_its_worker, args=(other,))
    process.start()
    other.close()
    end = connect(0, gather_over(mine, 0))
    assert end is not None
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="by peer: rank 1 has gone"):
        end.read(end.post(b"?"))
    end.close()
    mine.close()


def test_without_sockets_there_are_no_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the path of a socket is too long, or cannot be reached, all learn that there are none."""
    deep = tmp_path / ("a" * 100)
    deep.mkdir()
    monkeypatch.setattr(lines.tempfile, "mkdtemp", lambda: str(deep))
    assert connected(2) == [None, None]
