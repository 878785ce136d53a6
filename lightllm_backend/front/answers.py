# SPDX-License-Identifier: Apache-2.0
"""How an answer travels to an HTTP client: at once or as server-sent events, until the client hangs up. Pure ASGI.

A client that hangs up cancels the engine's requests at once. A stream's status is decided by its first event, so a
request that the engine refuses gets the status of its error. An error after that is an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightllm_backend.front.errors import ApiError, from_engine
from lightllm_client import LightLLMError

Result = TypeVar("Result")

log = logging.getLogger("lightllm.front")

CLIENT_GONE = 499  # nginx's status for a client that has hung up; nobody reads it
DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class ClientGone(ApiError):
    """The client has hung up before its answer was complete."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client has hung up")


async def read_body(request: Request) -> bytes:
    """Return the request's body; raise ClientGone if the client hangs up before its end."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGone from None


async def until_hang_up(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`; if the client hangs up first, cancel it and raise ClientGone."""
    return await _until_hang_up(request.receive, work)


async def _until_hang_up(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `events` yields bytes, each of one or more whole events, and is closed in any case."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        self.background = None
        self._events = events
        self._more_headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            await _until_hang_up(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        try:
            async for event in self._events:
                if not has_begun:
                    has_begun = True
                    headers = [*_STREAM_HEADERS, *self._more_headers]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except (LightLLMError, ApiError) as error:
            failure = from_engine(error) if isinstance(error, LightLLMError) else error
            if not has_begun:
                await failure.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": error_event(failure) + DONE, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"
