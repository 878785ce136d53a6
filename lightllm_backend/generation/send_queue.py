# SPDX-License-Identifier: Apache-2.0
"""Which stream sends next: in order of readiness, with few chunks on their way at once.

To hand a chunk to the server takes its time, and so does its way through the detokenizer. Where more streams have
something to send than the server can carry, they wait here, where tokens that come meanwhile join the chunk, and not in
the server's queues, where they would grow old. Where chunks hold the tokens of several steps already, a thread rests
after each as long as it has taken, so that what else this process has to do, new requests and the engine's tokens
before all, gets as much of the interpreter's time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Protocol

# Enough to keep the server and the detokenizers busy.
MAX_IN_FLIGHT = 48
# The server takes several chunks at once; not where an engine on the CPU would be short of cores.
NUM_THREADS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))

log = logging.getLogger(__name__)


class Sender(Protocol):
    """A stream, as far as it matters here."""

    coalesces: bool  # its last chunk held the tokens of several steps

    def send_pending(self) -> bool:
        """Send what there is; True if word will come that it has been delivered."""


class SendQueue:
    """Owns the lines in which streams wait to send, the threads that send, and the fact who has a chunk in flight."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._changed = threading.Condition()  # guards the four below
        self._urgent: deque[Sender] = deque()
        self._ready: deque[Sender] = deque()
        self._in_flight: set[Sender] = set()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._send_for_ever, name=f"send-queue-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, stream: Sender, urgent: bool) -> None:
        """It has something to send. What is urgent waits for nobody's delivery."""
        with self._changed:
            (self._urgent if urgent else self._ready).append(stream)
            self._wake_one()

    def mark_in_flight(self, stream: Sender) -> None:
        """It has sent something by itself."""
        with self._changed:
            self._in_flight.add(stream)

    def acknowledged(self, stream: Sender) -> None:
        """Nothing of it is in flight any more."""
        with self._changed:
            self._in_flight.discard(stream)
            self._wake_one()

    def send_next(self) -> bool:
        """Lets the next stream send; False if there is none. For tests, which have no threads."""
        with self._changed:
            stream = self._next()
        if stream is not None:
            self._send(stream)
        return stream is not None

    def close(self) -> None:
        """What may be sent now still is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _send_for_ever(self) -> None:
        rests_until = 0.0
        while True:
            with self._changed:
                while (stream := self._next(rest := max(0.0, rests_until - time.monotonic()))) is None:
                    if self._closed:
                        return
                    self._changed.wait(rest or None)
            began = time.monotonic()
            self._send(stream)
            if stream.coalesces:
                ended = time.monotonic()
                rests_until = ended + (ended - began)

    def _send(self, stream: Sender) -> None:
        awaits_acknowledgement = False
        try:
            awaits_acknowledgement = stream.send_pending()
        except Exception:
            log.exception("a chunk could not be sent")
        if not awaits_acknowledgement:
            self.acknowledged(stream)

    def _wake_one(self) -> None:
        """If there is something to send now; to wake up for nothing costs the others time."""
        if self._urgent or (self._ready and len(self._in_flight) < MAX_IN_FLIGHT):
            self._changed.notify()

    def _next(self, rest: float = 0.0) -> Sender | None:
        """Who sends next; while there is a `rest`, only who is urgent."""
        if self._urgent:
            stream = self._urgent.popleft()
        elif self._ready and len(self._in_flight) < MAX_IN_FLIGHT and (not rest or self._closed):
            stream = self._ready.popleft()
        else:
            return None
        self._in_flight.add(stream)
        return stream
