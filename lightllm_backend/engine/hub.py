# SPDX-License-Identifier: Apache-2.0
"""The worker's side of its clients' channels. No torch, no decisions: messages in, chunks out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

from lightllm_backend.engine.channel import (
    CANCEL,
    CHUNKS,
    READY,
    SUBMIT,
    Channel,
    ChannelClosed,
    EngineInfo,
    EngineStats,
    listen,
    pack_chunk,
)
from lightllm_backend.request import TokenChunk

STATS_SECONDS = 0.1


class Hub:
    """Owns the listener, the clients' channels, and the fact which client a request belongs to.

    A client that goes away has its requests cancelled. The `leash` is a file descriptor: when it reads end-of-file, the
    process that owns this worker is gone, and `open` becomes false.
    """

    def __init__(self, address: str, info: EngineInfo, leash: int) -> None:
        self.open = True
        self._info = asdict(info)
        self._leash = leash
        self._listener = listen(address)
        self._clients: dict[Channel, set[str]] = {}
        self._client_of: dict[str, Channel] = {}
        self._stats_sent = 0.0
        self._last_stats = EngineStats()

    def receive(self, timeout: float | None) -> Iterator[tuple[int, Any]]:
        """Messages that have come, as (kind, body). Waits for the first of them for `timeout` seconds."""
        sources: list[Any] = [self._leash, self._listener, *self._clients]
        for source in wait(sources, timeout):
            if source == self._leash:
                self.open = False
            elif isinstance(source, Channel):
                yield from self._read(source)
            else:
                self._accept()

    def send(self, chunks: list[TokenChunk], stats: EngineStats) -> None:
        """One message to each client that is concerned; to all of them when it is time for statistics."""
        by_client: dict[Channel, list[Any]] = defaultdict(list)
        for chunk in chunks:
            client = self._client_of.get(chunk.uid)
            if client is not None:
                by_client[client].append(pack_chunk(chunk))
            if chunk.finish_reason is not None:
                self._forget(chunk.uid)
        now = time.monotonic()
        tell = stats != self._last_stats and now >= self._stats_sent + STATS_SECONDS
        if tell:
            self._stats_sent, self._last_stats = now, stats
        for client in list(self._clients) if tell else list(by_client):
            try:
                client.send(CHUNKS, by_client[client], asdict(stats) if tell else None)
            except ChannelClosed:
                pass  # its end is read by the next receive(), which cancels its requests

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
        self._clients[client] = set()

    def _read(self, client: Channel) -> Iterator[tuple[int, Any]]:
        """All messages of a client that are there."""
        try:
            while client.has_message():
                kind, body = client.receive()
                if kind == SUBMIT:
                    self._clients[client].add(body[0])
                    self._client_of[body[0]] = client
                yield kind, body
        except ChannelClosed:
            for uid in self._clients.pop(client):
                del self._client_of[uid]
                yield CANCEL, uid
            client.close()

    def _forget(self, uid: str) -> None:
        client = self._client_of.pop(uid, None)
        if client is not None:
            self._clients[client].discard(uid)
