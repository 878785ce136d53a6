# SPDX-License-Identifier: Apache-2.0
"""Channels: typed messages between processes of one machine, over Unix sockets. No torch.

A frame is a msgpack list of two: the name of the message's class, and what the message packs itself into. Only plain
data travels, nothing is pickled: a stub and a worker may run different versions of Python and numpy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import msgpack

# Connections that may wait to be accepted: the models of one server, the ranks of one engine.
_BACKLOG = 64


class Message:
    """Base of all messages. A subclass is a dataclass; one whose fields are not plain data has a codec of its own."""

    def __init_subclass__(cls) -> None:
        assert cls.__name__ not in _message_classes, f"two messages are called {cls.__name__}"
        _message_classes[cls.__name__] = cls

    def pack(self) -> tuple[Any, ...]:
        """The message as plain data, as msgpack has it."""
        return tuple(vars(self).values())

    @classmethod
    def unpack(cls, *packed: Any) -> Message:
        """The message that was packed; tuples have become lists on the way."""
        return cls(*packed)


_message_classes: dict[str, type[Message]] = {}  # by name, as frames spell it


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end of a connection. Many threads may send; one receives."""

    def __init__(self, connection: Connection[bytes, bytes]) -> None:
        self._connection = connection
        # send(), receive() and close() each hold their own lock; close() also takes the other two before it closes the
        # socket.
        self._send_lock, self._receive_lock, self._close_lock = (threading.Lock() for _ in range(3))

    @classmethod
    def connect(cls, address: str) -> Channel:
        """Connect to the listener at `address`. Raises ChannelClosed if nobody listens there."""
        try:
            return cls(Client(address, family="AF_UNIX"))
        except OSError as error:
            raise ChannelClosed(f"nobody listens at {address}: {error}") from None

    @classmethod
    def accept(cls, listener: socket.socket) -> Channel:
        """Wait for the next process that connects to `listener`. Raises OSError once the listener is closed."""
        connected, _ = listener.accept()
        return cls(Connection(connected.detach()))

    def send(self, message: Message) -> None:
        """Send the message. Raises ChannelClosed if the other end is gone."""
        self.send_frame(frame_of(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a message that is already a frame, for one that goes to several channels."""
        with self._send_lock:
            try:
                self._connection.send_bytes(frame)
            except OSError as error:
                raise ChannelClosed(str(error)) from None

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed at the end, another error for a frame that makes no sense."""
        with self._receive_lock:
            try:
                frame = self._connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise ChannelClosed(str(error)) from None
        name, packed = msgpack.unpackb(frame)
        return _message_classes[name].unpack(*packed)

    def has_message(self) -> bool:
        """Whether receive() would return or raise at once."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def fileno(self) -> int:
        """The socket's file descriptor, for select()."""
        return self._connection.fileno()

    def close(self) -> None:
        """End both directions; threads that are blocked in send() or receive() get ChannelClosed.

        The socket is closed only after these threads have left it, since its number may be another file's at once.
        """
        with self._close_lock:
            if self._connection.closed:
                return
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
            with self._send_lock, self._receive_lock:
                self._connection.close()


def frame_of(message: Message) -> bytes:
    """The message as bytes."""
    frame: bytes = msgpack.packb((type(message).__name__, message.pack()))
    return frame


def listen(address: str) -> socket.socket:
    """A listener at a path in a private directory. It replaces a socket that a dead process left there."""
    Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(_BACKLOG)
    return listener
