# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the client of the ensemble, and calls of the front that has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from lightllm_backend.config import EngineConfig
from lightllm_backend.front.application import make_application
from lightllm_backend.front.state import Front
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_client import Chunk, Generation, LightLLMError, Unavailable

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "data" / "llama")
EOS = 2


def chunk(token_ids: Sequence[int], text: str, finish_reason: str = "", log_probs: Sequence[float] = ()) -> Chunk:
    return Chunk(text, tuple(token_ids), tuple(log_probs), 0.0, finish_reason, 4, len(token_ids))


class Stream(AsyncIterator[Chunk]):
    def __init__(self, items: Sequence[Chunk | LightLLMError], hangs: bool) -> None:
        self._items = iter(items)
        self._hangs = hangs
        self.is_closed = False

    async def __anext__(self) -> Chunk:
        for item in self._items:
            if isinstance(item, LightLLMError):
                raise item
            return item
        if self._hangs:
            await asyncio.Event().wait()
        raise StopAsyncIteration

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_closed = True


class Engine:
    """Answers every request with the same items, and remembers what it was asked."""

    def __init__(self, *items: Chunk | LightLLMError, hangs: bool = False, is_healthy: bool = True) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.streams: list[Stream] = []
        self._items = items
        self._hangs = hangs
        self._is_healthy = is_healthy

    def stream(self, prompt: Any, **options: Any) -> Stream:
        self.asked.append((prompt, options))
        items = [
            replace(item, index=index) if isinstance(item, Chunk) else item
            for index in range(options.get("n", 1))
            for item in self._items
        ]
        self.streams.append(Stream(items, self._hangs))
        return self.streams[-1]

    async def generate(self, prompt: Any, **options: Any) -> Generation:
        async with self.stream(prompt, **options) as stream:
            return Generation.join([item async for item in stream])

    async def generate_several(self, prompt: Any, **options: Any) -> list[Generation]:
        async with self.stream(prompt, **options) as stream:
            return Generation.join_several([item async for item in stream])

    async def health(self) -> float:
        if not self._is_healthy:
            raise Unavailable("the engine is not up")
        return 0.0


class Load:
    """A stand-in for what reads the metrics."""

    def __init__(self, used: int | None, total: int | None) -> None:
        self._load = {"kv_tokens_used": used, "kv_tokens_total": total}

    async def read(self) -> dict[str, int | None]:
        return self._load


def front_with(engine: Engine, load: Load | None = None) -> Any:
    config = EngineConfig()
    front = Front(
        config=config,
        model_name="model",
        client=engine,  # type: ignore[arg-type]
        tokenizer=TOKENIZER,
        lengths=LengthLimits.of(config, 2048),
        chat_template=None,
    )
    object.__setattr__(front, "engine_load", load or Load(None, None))
    return make_application(front)


def call(application: Any, use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://front") as client:
            return await use(client)

    return asyncio.run(run())


def post(engine: Engine, path: str, body: Any) -> httpx.Response:
    """Send a body as curl without a content type does; no JSON if it is bytes."""
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    response: httpx.Response = call(front_with(engine), lambda client: client.post(path, **sent))
    return response
