"""Messages among the processes of one machine, over sockets: no thread, no collective, and no waiting to send."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final
from weakref import WeakSet

_PATIENCE = 1800.0  # seconds, as long as a collective of gloo waits


_UNREAD = 16  # letters not yet read; what a socket holds is several times as much


@final
class SocketMessage:
    """One message of each process, in order of ranks; those of the others are empty until they are read."""

    __slots__ = ("parts",)

    def __init__(self, world: int) -> None:
        self.parts = [b""] * world


@final
class SocketChannel:
    """A line to each of the other processes. Every process posts the same number of messages, all of one length.

    Args:
        rank: This process.
        sockets: A connected socket for each of the others.
    """

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket]) -> None:
        self._rank = rank
        self._sockets = dict(sorted(sockets.items()))
        self._unread: dict[int, deque[SocketMessage]] = {other: deque() for other in self._sockets}
        _here.add(self)

    def post(self, data: bytes) -> SocketMessage:
        """Send a message to all, without waiting."""
        letter = SocketMessage(len(self._sockets) + 1)
        letter.parts[self._rank] = data
        for other, line in self._sockets.items():
            unread = self._unread[other]
            unread.append(letter)
            # Who has gone is missed when it is to be heard, and not before.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(data)
            # What nobody asks for must not fill the lines.
            if len(unread) > _UNREAD:
                unread.popleft().parts[other] = _receive(line, other, len(data))
        return letter

    def read(self, letter: SocketMessage) -> list[bytes]:
        """The message of each process, in order of ranks; waits for what has not been posted yet.

        Raises:
            RuntimeError: When one of them has gone or is silent for too long.
        """
        parts = letter.parts
        for other, line in self._sockets.items():
            while not parts[other]:
                # In the order in which they were posted: a line knows no other.
                self._unread[other].popleft().parts[other] = _receive(line, other, len(parts[self._rank]))
        return parts

    def close(self) -> None:
        """Nothing is sent any more; the others can still read what was."""
        for line in self._sockets.values():
            # A process forked from this one holds the socket too.
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def let_go(self) -> None:
        """Only this process is through with them: another one holds them too."""
        for line in self._sockets.values():
            line.close()


_here: WeakSet[SocketChannel] = WeakSet()


def _let_go() -> None:
    # A worker of a DataLoader may outlive its rank, and while it held the ends nobody would see that the rank has gone.
    for lines in list(_here):
        lines.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _receive(line: socket.socket, other: int, size: int) -> bytes:
    try:
        data = line.recv(size)
        while 0 < len(data) < size:
            more = line.recv(size - len(data))
            data = data + more if more else b""
    except BlockingIOError as error:
        raise RuntimeError(f"rank {other} has told nothing for {_PATIENCE:g} seconds") from error
    except ConnectionError as error:
        raise RuntimeError(f"Connection reset by peer: rank {other} has gone") from error
    if not data:
        raise RuntimeError(f"Connection closed by peer: rank {other} has gone")
    return data


def connect(rank: int, gather: Callable[[Any], list[Any]]) -> SocketChannel | None:
    """Lines among all processes, ``None`` where they cannot all reach each other; all must call it.

    Args:
        rank: This process.
        gather: Brings everybody's value to all.
    """
    folder = Path(tempfile.mkdtemp())  # where nobody else may connect
    path = str(folder / "line")
    listener = _listening(path)
    sockets: dict[int, socket.socket] = {}
    try:
        for other, place in enumerate(gather(path)[:rank]):
            line = _calling(place, rank)
            if line is not None:
                sockets[other] = line
        made = gather(listener is not None and len(sockets) == rank)
        if listener is None or not all(made):
            for line in sockets.values():
                line.close()
            return None
        while len(sockets) < len(made) - 1:
            line = _patient(listener.accept()[0])
            sockets[int.from_bytes(_receive(line, -1, 8), "big")] = line
        return SocketChannel(rank, sockets)
    finally:
        if listener is not None:
            listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def _listening(path: str) -> socket.socket | None:
    def listen(made: socket.socket) -> None:
        made.bind(path)
        made.listen(128)

    return _opened(listen)


def _calling(path: str, rank: int) -> socket.socket | None:
    def call(made: socket.socket) -> None:
        made.connect(path)
        made.sendall(rank.to_bytes(8, "big"))

    return _opened(call)


def _opened(prepare: Callable[[socket.socket], None]) -> socket.socket | None:
    if not hasattr(socket, "AF_UNIX"):
        return None
    made = _patient(socket.socket(socket.AF_UNIX))
    try:
        prepare(made)
    except OSError:  # the path is too long, or leads to another machine
        made.close()
        return None
    return made


def _patient(made: socket.socket) -> socket.socket:
    # Python's own time limit would ask the system twice for each message.
    limit = struct.pack("ll", int(_PATIENCE), round(_PATIENCE % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, limit)
    return made
