# SPDX-License-Identifier: Apache-2.0
"""Channels: typed messages between processes of one machine, over Unix sockets. No torch.

A frame is its length and a msgpack list of two: the name of the message's class, and what the message packs itself
into. Only plain data travels, nothing is pickled: a stub and a worker may run different versions of Python and numpy.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

# Connections that may wait to be accepted: the models of one server, the ranks of one engine.
_BACKLOG = 64
_CONNECT_SECONDS = 5.0
# What may wait for a process that does not read, before its connection ends. A step of 1,000 sequences makes 12 KB, or
# 100 KB with log probabilities: at 40 steps a second that is from 15 s to two minutes of not reading.
MAX_UNSENT_BYTES = 64 << 20
# More than a Unix socket holds by default (208 KiB), so that one call takes all that is there.
_RECEIVED_AT_ONCE = 256 << 10
_LENGTH = struct.Struct("!I")


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


class Unread(ChannelClosed):
    """The other end leaves too much unread, so the connection has been ended."""


class Channel:
    """One end of a connection. Many threads may send; one receives.

    Nobody who does not read holds up a sender: `send` never waits. What the socket does not take at once waits in the
    channel, for a thread that lives until all of it is sent.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # Whoever uses the socket holds a lock; close() takes all of them before it closes the socket.
        self._send_lock, self._late_lock, self._receive_lock, self._close_lock = (threading.Lock() for _ in range(4))
        self._all_sent = threading.Condition(self._send_lock)  # guards the next two
        self._unsent = bytearray()
        self._read_at = 0.0  # when the other end last made room, or the first of `_unsent` came
        self._received = bytearray()  # the beginning of the next frame

    @classmethod
    def connect(cls, address: str) -> Channel:
        """Connect to the listener at `address`. Raises ChannelClosed if nobody listens there."""
        connecting = socket.socket(socket.AF_UNIX)
        try:
            # With a time limit, a listener whose backlog is full, since its process stands still, is an error at once.
            connecting.settimeout(_CONNECT_SECONDS)
            connecting.connect(address)
        except OSError as error:
            connecting.close()
            raise ChannelClosed(f"nobody listens at {address}: {error}") from None
        connecting.settimeout(None)
        return cls(connecting)

    @classmethod
    def accept(cls, listener: socket.socket) -> Channel:
        """Wait for the next process that connects to `listener`. Raises OSError once the listener is closed."""
        return cls(listener.accept()[0])

    @property
    def num_unsent(self) -> int:
        """The bytes that wait for the other end to read."""
        return len(self._unsent)

    @property
    def unread_seconds(self) -> float:
        """For how long the other end has read nothing of what waits for it; 0 if nothing waits."""
        return time.monotonic() - self._read_at if self._unsent else 0.0

    def send(self, message: Message) -> None:
        """Send the message, without waiting for the other end. Raises ChannelClosed if the other end is gone.

        Raises Unread if the other end leaves more than MAX_UNSENT_BYTES unread, and ends the connection.
        """
        self.send_frame(frame_of(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a message that is already a frame, for one that goes to several channels."""
        header = _LENGTH.pack(len(frame))
        with self._send_lock:
            if self._unsent:
                self._unsent += header
                self._unsent += frame
            else:
                taken = self._pass_on(header, frame)
                if taken == len(header) + len(frame):
                    return
                self._unsent += memoryview(header + frame)[taken:]
                self._read_at = time.monotonic()
                threading.Thread(target=self._send_unsent, name="channel", daemon=True).start()
            if len(self._unsent) > MAX_UNSENT_BYTES:
                message = f"{len(self._unsent)} bytes are unread; at most {MAX_UNSENT_BYTES} may be"
                self._unsent.clear()
                self.shut_down()
                raise Unread(message)

    def flush(self, timeout: float) -> None:
        """Wait until nothing waits for the other end any more, or for `timeout` seconds."""
        with self._all_sent:
            self._all_sent.wait_for(lambda: not self._unsent, timeout)

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed at the end, another error for a frame that makes no sense."""
        with self._receive_lock:
            while (frame := self._next_frame()) is None:
                self._fill(0)
        return _message_of(frame)

    def receive_available(self) -> Iterator[Message]:
        """The messages that are there, without waiting, nor for the rest of one. Raises as `receive` does.

        After a message that makes no sense, those behind it are there at the next call.
        """
        with self._receive_lock, contextlib.suppress(BlockingIOError):
            if self._next_frame_size() is None:
                self._fill(socket.MSG_DONTWAIT)
        while True:
            with self._receive_lock:
                frame = self._next_frame()
            if frame is None:
                return
            yield _message_of(frame)

    def fileno(self) -> int:
        """The socket's file descriptor, for select()."""
        return self._socket.fileno()

    def shut_down(self) -> None:
        """End both directions, for the thread that receives: it gets what has come, then ChannelClosed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End both directions; a thread that waits in receive() gets ChannelClosed, and what is unsent is dropped.

        The socket is closed only after all threads have left it, since its number may be another file's at once.
        """
        with self._close_lock:
            self.shut_down()
            with self._late_lock, self._send_lock, self._receive_lock:
                self._unsent.clear()
                self._socket.close()

    def _pass_on(self, *parts: bytes | bytearray) -> int:
        """Give the socket what it takes at once; returns how many bytes that were. The caller holds _send_lock."""
        try:
            return self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._unsent.clear()
            self._all_sent.notify_all()
            raise ChannelClosed(str(error)) from None

    def _send_unsent(self) -> None:
        """Send what waits, as fast as the other end reads, until nothing waits any more."""
        with self._late_lock, contextlib.suppress(ChannelClosed):  # whoever sends or receives next finds the end, too
            if self._socket.fileno() < 0:
                return
            writable = select.poll()
            writable.register(self._socket, select.POLLOUT)
            while True:
                writable.poll()  # returns also once the connection is ended
                with self._all_sent:
                    if self._unsent:
                        del self._unsent[: self._pass_on(self._unsent)]
                        self._read_at = time.monotonic()
                    if not self._unsent:
                        self._all_sent.notify_all()
                        return

    def _fill(self, flags: int) -> None:
        try:
            received = self._socket.recv(_RECEIVED_AT_ONCE, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not received:
            raise ChannelClosed("the other end is closed")
        self._received += received

    def _next_frame_size(self) -> int | None:
        """The size of the next frame if all of it is there."""
        if len(self._received) < _LENGTH.size:
            return None
        [size] = _LENGTH.unpack_from(self._received)
        return size if len(self._received) >= _LENGTH.size + size else None

    def _next_frame(self) -> bytes | None:
        """Take the next frame if all of it is there."""
        size = self._next_frame_size()
        if size is None:
            return None
        end = _LENGTH.size + size
        frame = bytes(memoryview(self._received)[_LENGTH.size : end])
        del self._received[:end]
        return frame


def frame_of(message: Message) -> bytes:
    """The message as bytes."""
    frame: bytes = msgpack.packb((type(message).__name__, message.pack()))
    return frame


def _message_of(frame: bytes) -> Message:
    name, packed = msgpack.unpackb(frame)
    return _message_classes[name].unpack(*packed)


def listen(address: str) -> socket.socket:
    """A listener at a path in a private directory. It replaces a socket that a dead process left there."""
    Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(_BACKLOG)
    return listener
