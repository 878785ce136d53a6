# SPDX-License-Identifier: Apache-2.0
"""SendQueue: decides which stream sends next, in the order in which they become ready. No torch.

Few chunks are in flight at once. When streams have more to send than the server can carry, they wait here, where new
tokens join the pending chunk, and not in the server's queues, where a chunk would only grow old. Once chunks coalesce,
a sender sleeps as long as it just worked, to yield the GIL to the threads that take new requests and the engine's
tokens.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Protocol

# Keeps the server and both detokenizers busy: each of them works on one chunk at a time, the others wait between them.
# More would only move the waiting into the server's queues.
MAX_IN_FLIGHT = 48
# A chunk that is not acknowledged for so long counts no more: its detokenizer stands still, or is swamped, and others
# need not wait for it. An acknowledgement takes milliseconds. Its stream still has one chunk in flight.
OVERDUE_SECONDS = 1.0
# The server takes several chunks at once. A quarter of the cores at most, which an engine on the CPU needs more.
NUM_THREADS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))

log = logging.getLogger(__name__)


class Sender(Protocol):
    """What the queue knows of a stream."""

    coalesces: bool  # its last chunk held the tokens of several steps

    def send_pending(self) -> bool:
        """Send the pending chunk. Returns True if an acknowledgement will come."""


class SendQueue:
    """Owns the two lines of streams that wait to send, the threads that send, and the table of streams in flight."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._changed = threading.Condition()  # guards the four below
        self._urgent: deque[Sender] = deque()
        self._ready: deque[Sender] = deque()
        self._in_flight: dict[Sender, float] = {}  # with the times of sending; not the overdue ones
        self._closed = False
        self._threads = [
            threading.Thread(target=self._send_for_ever, name=f"send-queue-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, stream: Sender, urgent: bool) -> None:
        """Add a stream that has something to send. An urgent one does not wait until fewer are in flight."""
        with self._changed:
            (self._urgent if urgent else self._ready).append(stream)
            self._wake_one()

    def mark_in_flight(self, stream: Sender) -> None:
        """Count a stream that has sent something without the queue: a probe."""
        with self._changed:
            self._in_flight[stream] = time.monotonic()

    def acknowledged(self, stream: Sender) -> None:
        """Take note that the stream has nothing in flight any more."""
        with self._changed:
            self._in_flight.pop(stream, None)
            self._wake_one()

    def forget_overdue(self) -> None:
        """Let others send in place of streams whose chunk has not been acknowledged for OVERDUE_SECONDS."""
        sent_until = time.monotonic() - OVERDUE_SECONDS
        with self._changed:
            overdue = [stream for stream, sent_at in self._in_flight.items() if sent_at <= sent_until]
            for stream in overdue:
                del self._in_flight[stream]
            if overdue:
                self._changed.notify_all()

    def send_next(self) -> bool:
        """Let the next stream send; False if there is none. For tests, which have no threads."""
        with self._changed:
            stream = self._next()
        if stream is not None:
            self._send(stream)
        return stream is not None

    def close(self) -> None:
        """Stop the threads after they have sent what may be sent now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _send_for_ever(self) -> None:
        resting_until = 0.0
        while True:
            with self._changed:
                while (stream := self._next(rest := max(0.0, resting_until - time.monotonic()))) is None:
                    if self._closed:
                        return
                    self._changed.wait(rest or None)
            began = time.monotonic()
            self._send(stream)
            if stream.coalesces:
                ended = time.monotonic()
                resting_until = ended + (ended - began)

    def _send(self, stream: Sender) -> None:
        awaits_acknowledgement = False
        try:
            awaits_acknowledgement = stream.send_pending()
        except Exception:
            log.exception("a chunk could not be sent")
        if not awaits_acknowledgement:
            self.acknowledged(stream)

    def _wake_one(self) -> None:
        """Wake a thread if there is something to send now: a thread that wakes for nothing costs the others time."""
        if self._urgent or (self._ready and len(self._in_flight) < MAX_IN_FLIGHT):
            self._changed.notify()

    def _next(self, rest: float = 0.0) -> Sender | None:
        """The stream that sends next; during a `rest` only an urgent one."""
        if self._urgent:
            stream = self._urgent.popleft()
        elif self._ready and len(self._in_flight) < MAX_IN_FLIGHT and (not rest or self._closed):
            stream = self._ready.popleft()
        else:
            return None
        self._in_flight[stream] = time.monotonic()
        return stream
