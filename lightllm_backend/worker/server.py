# SPDX-License-Identifier: Apache-2.0
"""EngineServer: the worker's end of its clients' channels. It passes messages on and decides nothing. No torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

from lightllm_backend.messages.channel import Channel, ChannelClosed, Message, Unread, listen
from lightllm_backend.messages.engine_messages import Cancel, EngineInfo, Ready, Stats, Submit, Tokens
from lightllm_backend.request import TokenChunk
from lightllm_backend.router.batch import RouterOutput
from lightllm_backend.router.statistics import EngineStats

# How often clients get statistics; the metrics are carried over as often (FLUSH_SECONDS in metrics.py).
STATS_SECONDS = 0.1
# A client that has requests and reads nothing for so long stands still: its requests would compute for nobody.
MAX_UNREAD_SECONDS = 30.0
# From one attempt to accept a client to the next while that fails, for want of a file descriptor: the client waits.
ACCEPT_PAUSE_SECONDS = 1.0
# How long the last chunks of all clients may take to be read when the worker ends.
FLUSH_SECONDS = 1.0

# The Router's handle of a request: its client's index, above the number that the client gave the request.
NUMBER_BITS = 40  # 2 ** 40 requests of one client, at 10,000 a second, take three years
NUMBER_MASK = (1 << NUMBER_BITS) - 1

log = logging.getLogger("lightllm.worker")


class EngineServer:
    """Owns the listener, the clients' channels, and the fact which client a request belongs to.

    The requests of a client that goes away are cancelled. Nobody who does not read holds up the loop: what a client has
    not read waits in its channel, statistics are left out meanwhile, and a client that leaves too much unread, or reads
    nothing for too long, is cut off. `parent_pipe` is a file descriptor that reads end-of-file
    once the process that owns this worker is gone; then `open` becomes false.
    """

    def __init__(self, address: str, info: EngineInfo, parent_pipe: int) -> None:
        self.open = True
        self._ready = Ready(info)
        self._parent_pipe = parent_pipe
        self._listener = listen(address)
        self._accepts_at = 0.0  # not before this time
        self._clients: dict[Channel, int] = {}  # with indices, which are never used again
        self._indices = itertools.count()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._handles: dict[str, int] = {}  # by uid, of the requests that have not ended
        self._stats_sent_at = 0.0
        self._told: dict[Channel, EngineStats] = {}  # the statistics that each client was last sent

    def receive(self, timeout: float | None) -> Iterator[Message]:
        """The messages that have come; waits up to `timeout` seconds for the first. The number of a Submit is a handle.

        A handle differs from those of all other clients' requests.
        """
        self._cut_off_those_who_stand_still()
        sources: list[Any] = [self._parent_pipe, self._woken, *self._clients]
        if time.monotonic() >= self._accepts_at:  # else a client who cannot be accepted would wake the loop at once
            sources.append(self._listener)
        # poll() and epoll would round the timeout to whole milliseconds.
        for source in select.select(sources, [], [], timeout)[0]:
            if source == self._parent_pipe:
                self.open = False
            elif source is self._woken:
                self._woken.recv(4096)
            elif isinstance(source, Channel):
                yield from self._read(source)
            else:
                self._accept()

    def wake(self) -> None:
        """Make `receive` return; any thread may call this."""
        with contextlib.suppress(OSError):  # enough wakes it already, or it is closed
            self._waker.send(b".")

    def send(self, output: RouterOutput) -> None:
        """Send each client what the step has made for it, in one message."""
        chunks: dict[int, list[tuple[int, TokenChunk]]] = {index: [] for index in self._clients.values()}
        for chunk in output.chunks:
            handle = self._handles.get(chunk.uid)
            if handle is None:
                continue  # its client is gone
            chunks[handle >> NUMBER_BITS].append((handle & NUMBER_MASK, chunk))
            if chunk.finish_reason is not None:
                del self._handles[chunk.uid]
        indices, numbers = output.handles >> NUMBER_BITS, output.handles & NUMBER_MASK
        for client, index in self._clients.items():
            mine = indices == index
            if chunks[index] or mine.any():
                _send(client, Tokens(numbers[mine], output.token_ids[mine], chunks[index]))

    def publish(self, stats: EngineStats) -> None:
        """Send the statistics to clients that have others, every STATS_SECONDS at most.

        They are left out for whoever has something unread, until all of it is read.
        """
        now = time.monotonic()
        if now < self._stats_sent_at + STATS_SECONDS:
            return
        for client in self._clients:
            if self._told.get(client) != stats and not client.num_unsent:
                self._stats_sent_at, self._told[client] = now, stats
                _send(client, Stats(stats))

    def close(self) -> None:
        """Close the listener and all channels, once the clients have read their last chunks or take too long."""
        self._listener.close()
        self._woken.close()
        self._waker.close()
        ends = time.monotonic() + FLUSH_SECONDS
        for client in self._clients:
            client.flush(ends - time.monotonic())
            client.close()

    def _accept(self) -> None:
        try:
            client = Channel.accept(self._listener)
        except OSError as error:  # those who are connected go on
            if not self._accepts_at:
                log.error("a client cannot be accepted: %s; it is tried again until it succeeds", error)
            self._accepts_at = time.monotonic() + ACCEPT_PAUSE_SECONDS
            return
        self._accepts_at = 0.0
        try:
            client.send(self._ready)
        except ChannelClosed:
            return
        self._clients[client] = next(self._indices)

    def _read(self, client: Channel) -> Iterator[Message]:
        """All messages of a client that are there."""
        try:
            for message in client.receive_available():
                if isinstance(message, Submit):
                    message.number |= self._clients[client] << NUMBER_BITS
                    self._handles.update(zip(message.request.uids, itertools.count(message.number), strict=False))
                yield message
        except Exception as error:
            if not isinstance(error, ChannelClosed):
                log.exception("a client is cut off: its message makes no sense")
            index = self._clients.pop(client)
            self._told.pop(client, None)
            client.close()
            for uid in self._uids_of(index):
                del self._handles[uid]
                yield Cancel(uid)

    def _cut_off_those_who_stand_still(self) -> None:
        for client, index in self._clients.items():
            if client.unread_seconds > MAX_UNREAD_SECONDS and self._uids_of(index):
                log.warning("a client is cut off: it has read nothing for %.0f s", client.unread_seconds)
                client.shut_down()

    def _uids_of(self, index: int) -> list[str]:
        return [uid for uid, handle in self._handles.items() if handle >> NUMBER_BITS == index]


def _send(client: Channel, message: Message) -> None:
    try:
        client.send(message)
    except Unread as error:
        log.warning("a client is cut off: %s", error)
    except ChannelClosed:
        pass  # the next receive() reads the end of this channel and cancels its requests
