"""Messages among the ranks of one machine over Unix sockets. Sending needs no thread or collective, and never waits."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final
from weakref import WeakSet

from lightning_nanguard.thresholds import DistributedThresholds

SocketMessage = list[bytes]
"""One message of each rank, in the order of ranks. Those of other ranks are empty until they are read."""


@final
class SocketChannel:
    """Sockets to all other ranks. Every rank posts the same number of messages, all of the same length.

    Args:
        rank: Number of this rank.
        sockets: A connected socket for each other rank.
        thresholds: How long a read waits, and how many messages may stay unread.
    """

    def __init__(
        self,
        rank: int,
        sockets: Mapping[int, socket.socket],
        thresholds: DistributedThresholds = DistributedThresholds(),
    ) -> None:
        self._rank = rank
        self._sockets = dict(sorted(sockets.items()))
        self._thresholds = thresholds
        self._unread: dict[int, deque[SocketMessage]] = {other: deque() for other in self._sockets}
        _open_channels.add(self)

    def post(self, data: bytes) -> SocketMessage:
        """Send a message to all ranks, without waiting."""
        message = [b""] * (len(self._sockets) + 1)
        message[self._rank] = data
        for other, connection in self._sockets.items():
            unread = self._unread[other]
            unread.append(message)
            # If a rank is gone, reading its message raises an error.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            # Unread messages must not fill the buffer of the socket.
            if len(unread) > self._thresholds.unread_messages:
                self._read_next(other, len(data))
        return message

    def read(self, message: SocketMessage) -> SocketMessage:
        """The messages of all ranks in order. Waits for those that have not been posted yet.

        Raises:
            RuntimeError: If a rank is gone, or has sent nothing for ``thresholds.patience``.
        """
        for other in self._sockets:
            while not message[other]:
                self._read_next(other, len(message[self._rank]))
        return message

    def _read_next(self, other: int, size: int) -> None:
        # A socket delivers messages in the order in which they were sent.
        data = _receive(self._sockets[other], other, size, self._thresholds)
        self._unread[other].popleft()[other] = data

    def close(self) -> None:
        """Stop sending. Other ranks can still read the messages sent before."""
        for connection in self._sockets.values():
            # This ends the connection even if a forked process holds the socket too.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close_in_fork(self) -> None:
        """Close the copies of the sockets in a forked process. Those of its parent stay open."""
        for connection in self._sockets.values():
            connection.close()


_open_channels: WeakSet[SocketChannel] = WeakSet()


def _close_in_fork() -> None:
    # A DataLoader's worker may outlive its rank. If it kept the sockets open, other ranks would not see the rank's end.
    for channel in list(_open_channels):
        channel.close_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def _receive(connection: socket.socket, other: int, size: int, thresholds: DistributedThresholds) -> bytes:
    data = b""
    try:
        data = connection.recv(size)
        if 0 < len(data) < size:
            _set_timeout(connection, thresholds.seconds_for_rest)
            while len(data) < size and (more := connection.recv(size - len(data))):
                data += more
            _set_timeout(connection, thresholds.patience)
    except BlockingIOError as error:
        if data:
            raise RuntimeError(f"rank {other} has sent {len(data)} of the {size} bytes of a message") from error
        raise RuntimeError(f"rank {other} has sent nothing for {thresholds.patience:g} seconds") from error
    except ConnectionError as error:
        raise RuntimeError(f"Connection reset by peer: rank {other} has gone") from error
    if len(data) < size:
        raise RuntimeError(f"Connection closed by peer: rank {other} has gone")
    return data


def connect(
    rank: int, gather: Callable[[Any], list[Any]], thresholds: DistributedThresholds = DistributedThresholds()
) -> SocketChannel | None:
    """Connect all ranks; ``None`` if they cannot all reach each other. All ranks must call it.

    Every rank makes a secret, and ``gather`` sends it to the others. A rank that connects sends the secret of the rank
    that listens, which closes connections that do not send it.

    Args:
        rank: Number of this rank.
        gather: Returns the values of all ranks, in order.
        thresholds: How long a connection and a read wait, and how many messages may stay unread.
    """
    folder = Path(tempfile.mkdtemp())  # only this user may connect to a socket in it
    path, secret = str(folder / "socket"), secrets.token_hex()
    listener = _open_socket(partial(_listen, path), thresholds.seconds_to_connect)
    connections: dict[int, socket.socket] = {}
    try:
        told = gather([path, secret])
        for other, (address, theirs) in enumerate(told[:rank]):
            hello = bytes.fromhex(theirs) + rank.to_bytes(8, "big")
            connection = _open_socket(partial(_call, address, hello), thresholds.seconds_to_connect)
            if connection is not None:
                connections[other] = connection
        if all(gather(listener is not None and len(connections) == rank)) and listener is not None:
            callers = set(range(rank + 1, len(told)))
            connections |= _accept(listener, bytes.fromhex(secret), callers, thresholds)
        if not all(gather(len(connections) == len(told) - 1)):
            for connection in connections.values():
                connection.close()
            return None
        for connection in connections.values():
            _set_timeout(connection, thresholds.patience)
        return SocketChannel(rank, connections, thresholds)
    finally:
        if listener is not None:
            listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def _accept(
    listener: socket.socket, secret: bytes, callers: set[int], thresholds: DistributedThresholds
) -> dict[int, socket.socket]:
    """Accept the connections of the ranks that call; fewer if some do not call in time."""
    accepted: dict[int, socket.socket] = {}
    ends = time.monotonic() + thresholds.seconds_to_connect
    while callers - set(accepted) and (left := ends - time.monotonic()) > 0:
        _set_timeout(listener, left)
        try:
            connection = listener.accept()[0]
        except OSError:
            break
        # A rank of this run sends its secret right after it connects, so it is not waited for here.
        connection.setblocking(False)
        try:
            hello = connection.recv(len(secret) + 8)
        except OSError:
            hello = b""
        connection.setblocking(True)
        caller = int.from_bytes(hello[len(secret) :], "big")
        if hmac.compare_digest(hello[: len(secret)], secret) and caller in callers - set(accepted):
            accepted[caller] = connection
        else:
            connection.close()
    return accepted


def _open_socket(prepare: Callable[[socket.socket], None], patience: float) -> socket.socket | None:
    if not hasattr(socket, "AF_UNIX"):
        return None
    made = socket.socket(socket.AF_UNIX)
    _set_timeout(made, patience)
    try:
        prepare(made)
    except OSError:  # the path is too long, or it is on another machine
        made.close()
        return None
    return made


def _listen(path: str, made: socket.socket) -> None:
    made.bind(path)
    made.listen()


def _call(path: str, hello: bytes, made: socket.socket) -> None:
    made.connect(path)
    made.sendall(hello)


def _set_timeout(made: socket.socket, seconds: float) -> None:
    # Python's own timeout makes two system calls for each message. A limit of zero waits forever.
    limit = struct.pack("ll", *divmod(max(1, round(seconds * 1e6)), 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, limit)
