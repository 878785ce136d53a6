# SPDX-License-Identifier: Apache-2.0
"""The front with answers that the test writes, one event after the other, and with metrics that it sets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from lightllm_backend.config import EngineConfig
from lightllm_backend.front import errors
from lightllm_backend.front.errors import ApiError
from lightllm_backend.front.openai import models
from lightllm_backend.front.page.router import page_router
from lightllm_backend.front.security import Guard
from lightllm_backend.front.state import Front

WAIT = 60.0  # seconds; what a test waits for comes at once, except on a busy machine
MODEL = "tiny-model"


class Call:
    """A request for an answer, which the test answers from its own thread."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.path = path
        self.body = body
        self.has_ended = threading.Event()  # answered, or its client has gone
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

    def token(self, text: str, field: str = "content") -> None:
        choice = {"delta": {field: text}} if "messages" in self.body else {"text": text}
        self.event({"choices": [{**choice, "index": 0, "finish_reason": None}]})

    def finish(self, reason: str = "stop", completion_tokens: int = 2) -> None:
        choice = {"delta": {}} if "messages" in self.body else {"text": ""}
        self.event({"choices": [{**choice, "index": 0, "finish_reason": reason}]})
        self.event({"choices": [], "usage": {"completion_tokens": completion_tokens}})
        self._put("data: [DONE]\n\n")
        self.close()

    def event(self, data: dict[str, Any]) -> None:
        self._put(f"data: {json.dumps(data, ensure_ascii=False)}\n\n")

    def refuse(self, status: int, message: str) -> None:
        self._put(ApiError(status, message))

    def close(self) -> None:
        """End the stream here."""
        self._put(None)

    def _put(self, event: str | ApiError | None) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def response(self) -> Response:
        first = await self._events.get()
        if isinstance(first, ApiError):
            raise first
        return StreamingResponse(self._stream(first), media_type="text/event-stream")

    async def _stream(self, event: Any) -> AsyncIterator[str]:
        try:
            while event is not None:
                yield event
                event = await self._events.get()
        finally:
            self.has_ended.set()


class FakeFront:
    """The front at `url`; `metrics` is what it finds at the metrics endpoint."""

    def __init__(self, api_keys: tuple[str, ...] = (), has_chat_template: bool = True) -> None:
        self.metrics = "lightllm_engine_up 1\n"
        self.num_scrapes = 0
        self._calls: queue.Queue[Call] = queue.Queue()
        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        front = Front(
            config=EngineConfig(metrics_port=port),
            model_name=MODEL,
            client=cast(Any, contextlib.AsyncExitStack()),
            tokenizer=cast(Any, None),
            lengths=cast(Any, type("Lengths", (), {"max_total": 100})),
            chat_template=cast(Any, object() if has_chat_template else None),
        )
        application = FastAPI()
        application.state.front = front
        application.include_router(models.router)
        application.include_router(page_router(front))
        errors.install(application)
        application.add_middleware(Guard, api_keys=api_keys, max_body_bytes=front.config.max_body_bytes)
        application.post("/v1/chat/completions")(self._answer)
        application.post("/v1/completions")(self._answer)
        application.get("/metrics")(self._metrics)
        self._server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="front")

    def next_call(self) -> Call:
        """The next request for an answer, once it is here."""
        return self._calls.get(timeout=WAIT)

    async def _answer(self, request: Request) -> Response:
        call = Call(request.url.path, await request.json())
        self._calls.put(call)
        return await call.response()

    async def _metrics(self) -> Response:
        self.num_scrapes += 1
        return PlainTextResponse(self.metrics)

    def __enter__(self) -> FakeFront:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def running(**options: Any) -> Iterator[FakeFront]:
    """For a fixture."""
    with FakeFront(**options) as front:
        yield front
