"""Messages among processes of one machine; most tests use one thread for each rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.distributed import sockets
from lightning_nanguard.distributed.sockets import SocketChannel, connect
from lightning_nanguard.thresholds import DistributedThresholds

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no such sockets here")


def connected(
    world: int, patience: float = 20.0, meet: Callable[[list[Any]], None] = lambda told: None, **options: float
) -> list[SocketChannel | None]:
    """What each of several threads gets.

    Args:
        world: How many.
        patience: Seconds that a read waits.
        meet: Called once by one of them with what each has told the others first, before anybody goes on.
        options: Further thresholds.
    """
    thresholds = DistributedThresholds(patience=patience, **options)
    values: list[list[Any]] = [[] for _ in range(world)]
    meeting = threading.Barrier(world)

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            values[rank].append(value)
            if meeting.wait(20) == 0 and len(values[rank]) == 1:
                meet([told[0] for told in values])
            meeting.wait(20)
            return [told[len(values[rank]) - 1] for told in values]

        return gather

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: connect(rank, gather_of(rank), thresholds), range(world)))


@pytest.fixture(params=[2, 3])
def channels(request: pytest.FixtureRequest) -> Iterator[list[SocketChannel]]:
    """The channel of each of several ranks."""
    channels = [one for one in connected(request.param) if one is not None]
    assert len(channels) == request.param
    yield channels
    for one in channels:
        one.close()


def test_all_read_the_same(channels: list[SocketChannel]) -> None:
    """Each reads what all posted, in the order of ranks."""
    messages = [channel.post(bytes([rank, 7])) for rank, channel in enumerate(channels)]
    read = [channel.read(message) for channel, message in zip(channels, messages, strict=True)]
    assert read == [[bytes([rank, 7]) for rank in range(len(channels))]] * len(channels)


def test_a_message_may_be_read_late_or_never(channels: list[SocketChannel]) -> None:
    """Messages do not depend on the order in which they are read, nor on those that nobody reads."""
    messages = [[channel.post(bytes([number])) for number in range(4)] for channel in channels]
    for channel, own in zip(channels, messages, strict=True):
        assert channel.read(own[3]) == [bytes([3])] * len(channels)
        assert channel.read(own[1]) == [bytes([1])] * len(channels)


def test_unread_messages_do_not_fill_a_socket(channels: list[SocketChannel]) -> None:
    """More can be posted, in turn, than a socket holds, and the last message is still read."""
    data = bytes(100)
    for _ in range(2000):
        messages = [channel.post(data) for channel in channels]
    assert channels[0].read(messages[0]) == [data] * len(channels)


def test_a_rank_that_has_gone_is_missed_when_it_is_read(channels: list[SocketChannel]) -> None:
    """What it posted before is read; then reading raises, and posting does not."""
    messages = [channel.post(b"last") for channel in channels]
    channels[-1].close()
    assert channels[0].read(messages[0]) == [b"last"] * len(channels)
    message, *_ = [channel.post(b"more") for channel in channels[:-1]]
    with pytest.raises(RuntimeError, match="by peer: rank"):
        channels[0].read(message)


def test_a_silent_rank_is_not_waited_for_without_end() -> None:
    """A read raises, by name of the rank, once a rank has posted nothing for as long as `patience`."""
    one, other = connected(2, patience=0.05)
    assert one is not None
    assert other is not None
    with pytest.raises(RuntimeError, match=r"rank 1 has sent nothing for 0\.05 seconds"):
        one.read(one.post(b"?"))
    one.close()
    other.close()


def strangers_at(hellos: list[Callable[[bytes], bytes]], opened: list[socket.socket]) -> Callable[[list[Any]], None]:
    """Processes that are not of the run, each of which calls the first rank and sends something, or nothing."""

    def call(told: list[Any]) -> None:
        path, secret = told[0]
        for hello in hellos:
            opened.append(made := socket.socket(socket.AF_UNIX))
            made.connect(path)
            made.sendall(hello(bytes.fromhex(secret)))

    return call


def test_a_stranger_is_turned_away() -> None:
    """Who does not know the secret of the run, says nothing, or says that he is a rank that there is not, gets no
    connection, and the ranks of the run get theirs.
    """
    one = (1).to_bytes(8, "big")
    opened: list[socket.socket] = []
    hellos: list[Callable[[bytes], bytes]] = [
        lambda secret: b"",
        lambda secret: one,
        lambda secret: bytes(len(secret)) + one,
        lambda secret: secret,
        lambda secret: secret + (7).to_bytes(8, "big"),
    ]
    channels = [one for one in connected(2, meet=strangers_at(hellos, opened)) if one is not None]
    assert len(channels) == 2
    messages = [channel.post(bytes([rank, 7])) for rank, channel in enumerate(channels)]
    assert channels[0].read(messages[0]) == [bytes([0, 7]), bytes([1, 7])]
    for stranger in opened:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # what it sent was not read to its end
            assert stranger.recv(1) == b""
    for made in (*channels, *opened):
        made.close()


def test_ranks_that_cannot_connect_know_it_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank's call does not arrive, no rank gets a channel, and none waits longer than `seconds_to_connect`."""
    called = sockets._call
    monkeypatch.setattr(sockets, "_call", lambda path, hello, made: called(path, hello[::-1], made))
    begin = time.monotonic()
    assert connected(3, patience=60.0, seconds_to_connect=0.2) == [None, None, None]
    assert time.monotonic() - begin < 5


def test_a_message_that_breaks_off_is_an_error_in_seconds() -> None:
    """However long a read may wait for a message, the rest of one that has begun is not waited for as long."""
    mine, other = socket.socketpair()
    channel = SocketChannel(0, {1: mine}, DistributedThresholds(patience=60.0, seconds_for_rest=0.1))
    other.sendall(b"half")
    message = channel.post(b"a message")
    with pytest.raises(RuntimeError, match="rank 1 has sent 4 of the 9 bytes of a message"):
        channel.read(message)
    channel.close()
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
    assert connect(1, gather_over(pipe, 1)) is not None
    ready, told = os.pipe()
    if os.fork() == 0:
        os.write(told, b"!")
        pipe.poll(60)  # until the test ends
        os._exit(0)
    os.read(ready, 1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_does_not_keep_a_socket_open() -> None:
    """A rank that is killed is missed at once, though a process forked from it lives on."""
    mine, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=killed_beside_its_worker, args=(other,))
    process.start()
    other.close()
    channel = connect(0, gather_over(mine, 0), DistributedThresholds(patience=10.0))
    assert channel is not None
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="by peer: rank 1 has gone"):
        channel.read(channel.post(b"?"))
    channel.close()
    mine.close()


def test_without_sockets_there_is_no_channel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the path of a socket is too long, or cannot be reached, all learn that there are none."""
    deep = tmp_path / ("a" * 100)
    deep.mkdir()
    monkeypatch.setattr(sockets.tempfile, "mkdtemp", lambda: str(deep))
    assert connected(2) == [None, None]
