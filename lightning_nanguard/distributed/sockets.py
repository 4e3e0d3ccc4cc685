"""Messages among the processes of one machine over Unix sockets: no thread, no collective, no waiting to send."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final
from weakref import WeakSet

from lightning_nanguard.thresholds import DistributedThresholds

_DEFAULTS = DistributedThresholds()


@final
class SocketMessage:
    """One message of each process, in the order of ranks; those of other ranks are empty until they are read."""

    __slots__ = ("parts",)

    def __init__(self, world: int) -> None:
        self.parts = [b""] * world


@final
class SocketChannel:
    """A socket to each of the other processes. Every process posts the same number of messages, all of one length.

    Args:
        rank: This process.
        sockets: A connected socket for each of the others.
        thresholds: How long a read waits, and how many messages may stay unread.
    """

    def __init__(
        self, rank: int, sockets: Mapping[int, socket.socket], thresholds: DistributedThresholds = _DEFAULTS
    ) -> None:
        self._rank = rank
        self._sockets = dict(sorted(sockets.items()))
        self._thresholds = thresholds
        self._unread: dict[int, deque[SocketMessage]] = {other: deque() for other in self._sockets}
        _open_channels.add(self)

    def post(self, data: bytes) -> SocketMessage:
        """Send a message to all, without waiting."""
        message = SocketMessage(len(self._sockets) + 1)
        message.parts[self._rank] = data
        for other, connection in self._sockets.items():
            unread = self._unread[other]
            unread.append(message)
            # A rank that has gone is reported by the read of what it did not send.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            # Messages that nobody reads must not fill the socket's buffer.
            if len(unread) > self._thresholds.unread_messages:
                self._read_next(other, len(data))
        return message

    def read(self, message: SocketMessage) -> list[bytes]:
        """The message of each process, in the order of ranks; waits for those that have not been posted yet.

        Raises:
            RuntimeError: When a rank has gone, or is silent for longer than ``thresholds.patience``.
        """
        parts = message.parts
        for other in self._sockets:
            while not parts[other]:
                self._read_next(other, len(parts[self._rank]))
        return parts

    def _read_next(self, other: int, size: int) -> None:
        # A socket delivers messages in the order in which they were posted.
        data = _receive(self._sockets[other], other, size, self._thresholds.patience)
        self._unread[other].popleft().parts[other] = data

    def close(self) -> None:
        """Send nothing any more; other ranks can still read what was sent."""
        for connection in self._sockets.values():
            # Ends the connection although a forked process holds the socket too.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close_in_fork(self) -> None:
        """Close the copies of the sockets in a forked process; those of the process it was forked from stay open."""
        for connection in self._sockets.values():
            connection.close()


_open_channels: WeakSet[SocketChannel] = WeakSet()


def _close_in_fork() -> None:
    # A DataLoader's worker may outlive its rank. If it held the sockets, no other rank would see that the rank is gone.
    for channel in list(_open_channels):
        channel.close_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def _receive(connection: socket.socket, other: int, size: int, patience: float) -> bytes:
    try:
        data = connection.recv(size)
        while 0 < len(data) < size:
            more = connection.recv(size - len(data))
            data = data + more if more else b""
    except BlockingIOError as error:
        raise RuntimeError(f"rank {other} has sent nothing for {patience:g} seconds") from error
    except ConnectionError as error:
        raise RuntimeError(f"Connection reset by peer: rank {other} has gone") from error
    if not data:
        raise RuntimeError(f"Connection closed by peer: rank {other} has gone")
    return data


def connect(
    rank: int, gather: Callable[[Any], list[Any]], thresholds: DistributedThresholds = _DEFAULTS
) -> SocketChannel | None:
    """A channel among all processes, ``None`` where they cannot all reach each other; all ranks must call it.

    Args:
        rank: This process.
        gather: Returns the values of all ranks, in order.
        thresholds: How long a read waits, and how many messages may stay unread.
    """
    folder = Path(tempfile.mkdtemp())  # only this user may connect to a socket in it
    path = str(folder / "socket")
    listener = _open_socket(partial(_listen, path), thresholds.patience)
    sockets: dict[int, socket.socket] = {}
    try:
        for other, address in enumerate(gather(path)[:rank]):
            connection = _open_socket(partial(_call, address, rank), thresholds.patience)
            if connection is not None:
                sockets[other] = connection
        reached = gather(listener is not None and len(sockets) == rank)
        if listener is None or not all(reached):
            for connection in sockets.values():
                connection.close()
            return None
        while len(sockets) < len(reached) - 1:
            connection = listener.accept()[0]
            _set_timeout(connection, thresholds.patience)
            sockets[int.from_bytes(_receive(connection, -1, 8, thresholds.patience), "big")] = connection
        return SocketChannel(rank, sockets, thresholds)
    finally:
        if listener is not None:
            listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def _open_socket(prepare: Callable[[socket.socket], None], patience: float) -> socket.socket | None:
    if not hasattr(socket, "AF_UNIX"):
        return None
    made = socket.socket(socket.AF_UNIX)
    _set_timeout(made, patience)
    try:
        prepare(made)
    except OSError:  # the path is too long, or belongs to another machine
        made.close()
        return None
    return made


def _listen(path: str, made: socket.socket) -> None:
    made.bind(path)
    made.listen()


def _call(path: str, rank: int, made: socket.socket) -> None:
    made.connect(path)
    made.sendall(rank.to_bytes(8, "big"))


def _set_timeout(made: socket.socket, seconds: float) -> None:
    # Python's own timeout would make two system calls for each message.
    limit = struct.pack("ll", int(seconds), round(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, limit)
