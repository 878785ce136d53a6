# SPDX-License-Identifier: Apache-2.0
"""RequestBody: receives the body of one request, up to a limit. Pure ASGI."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from lightllm_backend.front.errors import ApiError

# As nginx: for how long the rest of a refused body is dropped in all (lingering_time), and while nothing comes
# (lingering_timeout).
MAX_DROPPING_SECONDS = 30.0
MAX_IDLE_SECONDS = 5.0


class RequestBody:
    """The body of one request."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_received = 0
        self.has_ended = False  # all of it has been received, or the client has gone

    def check_length(self, content_length: bytes) -> None:
        """Raise ApiError 413 if the header says that the body is too large."""
        if content_length.isdigit() and int(content_length) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """Receive the next part; raise HTTPException 413, which FastAPI passes on, once the body is too large."""
        message = await self._receive_any()
        if self._num_received > self._max_bytes:
            error = self._too_large()
            raise HTTPException(error.status, error.message, error.headers)
        return message

    async def drop_rest(self) -> None:
        """Receive and forget what the client still sends, for a limited time.

        A client may send its whole body before it reads. If uvicorn closes the connection meanwhile, TCP resets it, and
        the client never sees the answer (findings/early_answer_is_lost.sh).
        """
        deadline = time.monotonic() + MAX_DROPPING_SECONDS
        while not self.has_ended and (seconds_left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._receive_any(), min(seconds_left, MAX_IDLE_SECONDS))
            except asyncio.TimeoutError:
                return

    async def _receive_any(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_received += len(message.get("body", b""))
        self.has_ended = not message.get("more_body", False)
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is too large; allowed: at most {self._max_bytes} bytes (max_body_bytes)",
            headers={"connection": "close"},
        )
