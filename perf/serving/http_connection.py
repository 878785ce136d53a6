# SPDX-License-Identifier: Apache-2.0
"""HttpConnection: HTTP/1.1 for a load generator, with httptools.

The time that a client library takes for itself would count as the server's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import httptools

CONNECT_SECONDS = 30.0


class HttpConnection(asyncio.Protocol):
    """A connection that carries one request at a time, and may be kept for the next."""

    def __init__(self) -> None:
        self._status = 0  # of the answer; 0 until it is known
        self._changed = asyncio.Event()
        self._pieces: deque[bytes] = deque()
        self._is_over = True
        self._fault: str | None = None

    @classmethod
    async def open(cls, address: str) -> HttpConnection:
        """Connect to host:port; raise OSError."""
        host, _, port = address.rpartition(":")
        connecting = asyncio.get_running_loop().create_connection(cls, host, int(port))
        try:
            _, connection = await asyncio.wait_for(connecting, CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise OSError(f"{address} does not answer within {CONNECT_SECONDS:g} s") from None
        return connection

    @property
    def may_be_used(self) -> bool:
        """Whether another request may be sent."""
        return self._is_over and self._fault is None

    async def post(self, path: str, body: bytes, timeout: float) -> int:
        """Send a request with a JSON body; return the status of the answer, which may take `timeout` seconds in all."""
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._is_over = 0, False
        self._timer = asyncio.get_running_loop().call_later(timeout, self._end, f"no answer within {timeout:g} s")
        head = f"POST {path} HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._transport.write(head.encode() + b"\r\n\r\n" + body)
        while not self._status:
            await self._change()
        return self._status

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body of the answer as it comes."""
        while self._pieces or not self._is_over:
            if self._pieces:
                yield self._pieces.popleft()
            else:
                await self._change()

    def close(self) -> None:
        self._end("the connection is closed here")

    async def _change(self) -> None:
        """Wait for more of the answer; raise OSError if there will be none."""
        if self._fault is not None:
            raise OSError(self._fault)
        self._changed.clear()
        await self._changed.wait()

    def _end(self, fault: str) -> None:
        self._fault = self._fault or fault
        self._transport.abort()
        self._changed.set()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"the server's answer is no HTTP: {error}")
        self._changed.set()

    def connection_lost(self, _error: Exception | None) -> None:
        self._end("the server has closed the connection")

    # httptools' callbacks

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._is_over = True
        self._timer.cancel()
        if not self._parser.should_keep_alive():
            self._end("the server closes the connection")
