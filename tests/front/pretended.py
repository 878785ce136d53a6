# SPDX-License-Identifier: Apache-2.0
"""A pretended engine's client, and calls of the front's application without a network."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from lightllm_backend.front.application import make_application
from lightllm_backend.front.state import Front
from lightllm_client import Chunk, Generation

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ '' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.x }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if tools %}tools={{ tools | length }}{{ '\\n' }}{% endif %}{{ extra }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class PretendedStream:
    """A stream of given chunks; an exception among them is raised, an event waited for."""

    items: list[Any]
    closed: bool = False

    def __aiter__(self) -> PretendedStream:
        return self

    async def __anext__(self) -> Chunk:
        while self.items:
            item = self.items.pop(0)
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Chunk):
                return item
            await item.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class PretendedClient:
    """Stands for AsyncLightLLMClient: records calls, and answers each with `items`."""

    items: list[Any] = field(default_factory=list)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    streams: list[PretendedStream] = field(default_factory=list)

    def stream(self, prompt: Any, **options: Any) -> PretendedStream:
        self.calls.append((prompt, options))
        answers = range(options.get("n", 1))
        items = [replace(item, index=index) for item in self.items if isinstance(item, Chunk) for index in answers]
        self.streams.append(PretendedStream(items if len(answers) > 1 else list(self.items)))
        return self.streams[-1]

    async def generate(self, prompt: Any, **options: Any) -> Generation:
        stream = self.stream(prompt, **options)
        try:
            return Generation.join([chunk async for chunk in stream])
        finally:
            await stream.aclose()

    async def generate_several(self, prompt: Any, **options: Any) -> list[Generation]:
        return Generation.join_several([chunk async for chunk in self.stream(prompt, **options)])

    async def __aenter__(self) -> PretendedClient:
        return self

    async def __aexit__(self, *_: object) -> None: ...


def chunk(text: str, *token_ids: int, finish_reason: str = "", log_probs: tuple[float, ...] = ()) -> Chunk:
    return Chunk(text, token_ids, log_probs, sum(log_probs), finish_reason, 5, len(token_ids), 3)


class Caller:
    """Calls the application."""

    def __init__(self, front: Front, api_keys: tuple[str, ...] = ()) -> None:
        self.application = make_application(front, api_keys)

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.application, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
                return await http.request(method, path, **request)

        return asyncio.run(call())

    def post(self, path: str, body: Any, **request: Any) -> httpx.Response:
        return self("POST", path, json=body, **request)

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error that a body gets."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]
