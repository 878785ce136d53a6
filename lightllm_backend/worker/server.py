# SPDX-License-Identifier: Apache-2.0
"""The worker's side of its clients' channels. No torch, no decisions: messages in, tokens out."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lightllm_backend.messages.channel import (
    CANCEL,
    READY,
    STATS,
    SUBMIT,
    TOKENS,
    Channel,
    ChannelClosed,
    EngineInfo,
    EngineStats,
    listen,
    pack_chunk,
)
from lightllm_backend.router.batch import StepOutput

STATS_SECONDS = 0.1

# A handle is the client's index above these bits, and the number that the client gave the request in them.
NUMBER_BITS = 40
NUMBER_MASK = (1 << NUMBER_BITS) - 1


class EngineServer:
    """Owns the listener, the clients' channels, and the fact which client a request belongs to.

    The requests of a client that goes away are cancelled. `parent_pipe` is a file descriptor that reads end-of-file
    once the process that owns this worker is gone; then `open` becomes false.
    """

    def __init__(self, address: str, info: EngineInfo, parent_pipe: int) -> None:
        self.open = True
        self._info = asdict(info)
        self._parent_pipe = parent_pipe
        self._listener = listen(address)
        self._clients: dict[Channel, int] = {}  # with an index that none had before
        self._indices = itertools.count()
        self._handles: dict[str, int] = {}  # of the requests that have not ended, by uid
        self._stats_sent = 0.0
        self._last_stats = EngineStats()

    def receive(self, timeout: float | None) -> Iterator[tuple[int, Any]]:
        """Messages that have come, as (kind, body); the body of SUBMIT is (request, handle), of the others a uid.

        Waits for the first of them for `timeout` seconds.
        """
        sources: list[Any] = [self._parent_pipe, self._listener, *self._clients]
        # The other ways to wait count whole milliseconds.
        for source in select.select(sources, [], [], timeout)[0]:
            if source == self._parent_pipe:
                self.open = False
            elif isinstance(source, Channel):
                yield from self._read(source)
            else:
                self._accept()

    def send(self, output: StepOutput) -> None:
        """One message to each client that is concerned."""
        chunks: dict[int, list[Any]] = {index: [] for index in self._clients.values()}
        for chunk in output.chunks:
            handle = self._handles.get(chunk.uid)
            if handle is None:
                continue  # its client is gone
            chunks[handle >> NUMBER_BITS].append((handle & NUMBER_MASK, pack_chunk(chunk)))
            if chunk.finish_reason is not None:
                del self._handles[chunk.uid]
        indices, numbers = output.handles >> NUMBER_BITS, output.handles & NUMBER_MASK
        for client, index in self._clients.items():
            mine = indices == index
            if chunks[index] or mine.any():
                _send(client, TOKENS, numbers[mine].tobytes(), output.tokens[mine].tobytes(), chunks[index])

    def tell(self, stats: EngineStats) -> None:
        """Statistics to all clients, when they are new and it is time."""
        now = time.monotonic()
        if stats != self._last_stats and now >= self._stats_sent + STATS_SECONDS:
            self._stats_sent, self._last_stats = now, stats
            for client in self._clients:
                _send(client, STATS, asdict(stats))

    def close(self) -> None:
        self._listener.close()
        for client in self._clients:
            client.close()

    def _accept(self) -> None:
        client = Channel.accept(self._listener)
        try:
            client.send(READY, self._info)
        except ChannelClosed:
            return
        self._clients[client] = next(self._indices)

    def _read(self, client: Channel) -> Iterator[tuple[int, Any]]:
        """All messages of a client that are there."""
        try:
            while client.has_message():
                kind, body, *number = client.receive()
                if kind == SUBMIT:
                    handle = self._clients[client] << NUMBER_BITS | number[0]
                    self._handles[body[0]] = handle
                    body = body, handle
                yield kind, body
        except ChannelClosed:
            index = self._clients.pop(client)
            client.close()
            for uid in [uid for uid, handle in self._handles.items() if handle >> NUMBER_BITS == index]:
                del self._handles[uid]
                yield CANCEL, uid


def _send(client: Channel, *message: Any) -> None:
    try:
        client.send(*message)
    except ChannelClosed:
        pass  # its end is read by the next receive(), which cancels its requests
