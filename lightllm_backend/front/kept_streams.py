# SPDX-License-Identifier: Apache-2.0
"""gRPC streams to the ensemble that outlive a request: to open one for each takes Triton server and us a millisecond.

A stream carries one request at a time. The next one may have it when the server has sent the final response; a stream
whose request was cancelled or refused ends. Triton server does not end as long as a stream is open: whoever stops it
stops the front first, as the launch command does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

MAX_IDLE = 256  # that wait for a request; beyond it a stream ends with its request


class KeptStreams:
    """The streams of one connection that wait for a request."""

    def __init__(self, open_stream: Callable[[], Any], max_idle: int = MAX_IDLE) -> None:
        """open_stream: returns a new gRPC call, of messages both ways."""
        self._open = open_stream
        self._max_idle = max_idle
        self._idle: list[Any] = []

    def call(self, request: Any) -> KeptStreamCall:
        """Return the call that sends a request when it is first read."""
        # Triton server keeps a final flag that comes without a response to itself unless it is asked for.
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        return KeptStreamCall(self, request)

    def take(self) -> Any:
        """Return a stream that has no request, a new one if none waits."""
        while self._idle:
            stream = self._idle.pop()
            if not stream.done():  # by the server, which has stopped
                return stream
        return self._open()

    def keep(self, stream: Any) -> bool:
        """Take back a stream whose request is over; return whether there was room."""
        has_room = len(self._idle) < self._max_idle
        if has_room:
            self._idle.append(stream)
        return has_room


class KeptStreamCall:
    """One request on a stream: reads and ends like a gRPC call of its own."""

    def __init__(self, streams: KeptStreams, request: Any) -> None:
        self._streams = streams
        self._request = request
        self._stream: Any = None
        self._is_over = False
        self._is_cancelled = False

    async def read(self) -> Any:
        """Return the next message, or grpc.aio.EOF; raise what a gRPC call raises."""
        if self._is_over:
            return grpc.aio.EOF
        if self._stream is None:
            if self._is_cancelled:
                raise asyncio.CancelledError
            self._stream = self._streams.take()
            await self._stream.write(self._request)
        message = await self._stream.read()
        if message is grpc.aio.EOF:
            self._is_over = True
        elif message.error_message:
            await self._stream.done_writing()
        elif message.infer_response.parameters["triton_final_response"].bool_param:
            self._is_over = self._streams.keep(self._stream)
            if not self._is_over:
                await self._stream.done_writing()
        return message

    def cancel(self) -> None:
        """End the request, and its stream with it, unless it is over."""
        if self._is_over:
            return
        self._is_cancelled = True
        if self._stream is not None:
            self._stream.cancel()
