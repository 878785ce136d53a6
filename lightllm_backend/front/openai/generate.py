# SPDX-License-Identifier: Apache-2.0
"""Runs the engine's requests for one request of the API: n answers to each prompt."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightllm_backend.front.chat.tool_choice import name_parameters
from lightllm_backend.front.errors import ApiError, from_engine
from lightllm_backend.front.state import Front
from lightllm_backend.request import MAX_ANSWERS
from lightllm_client import AsyncChunkStream, AsyncLightLLMClient, Chunk, Generation, InvalidArgument

MAX_CHOICES = 4096  # of one request

Prompt = str | list[int]


@dataclass(frozen=True)
class Job:
    """The engine's requests for one request of the API. Answer i is copy i % n of prompt i // n."""

    front: Front
    prompts: Sequence[Prompt]
    options: dict[str, Any]
    seeds: Sequence[int | None]  # of the n answers to a prompt: consecutive, or all None
    kind: str  # begins the id
    constrained_by: str = ""  # the field of the body that says what the answers must follow
    prompt_field: str = "prompt"  # the field that the prompts are made of
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.kind}-{secrets.token_hex(12)}")
        if self.number > MAX_CHOICES:
            message = f"the request asks for {self.number} answers; allowed: at most {MAX_CHOICES} (prompts times n)"
            raise ApiError(400, message, "n")

    @property
    def number(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // len(self.seeds)]

    async def whole(self) -> list[Generation]:
        """Return all answers. The first error cancels the others."""
        client = self.front.client
        calls = [
            client.generate_several(call.prompt, **call.options) if call.options.get("n") else _one(client, call)
            for call in self._calls()
        ]
        with self._refusals():
            return [answer for answers in await _all(calls) for answer in answers]

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Yield the chunks of all answers as they come, each with the index of its answer."""
        calls = self._calls()
        streams = [self.front.client.stream(call.prompt, **call.options) for call in calls]
        try:
            with self._refusals():
                if len(streams) == 1:
                    async for chunk in streams[0]:
                        yield chunk.index, chunk
                else:
                    async for number, chunk in _merged(streams):
                        yield calls[number].first + chunk.index, chunk
        finally:
            for stream in streams:
                await stream.aclose()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Name the field of the body where the engine's refusal names its own option."""
        try:
            yield
        except InvalidArgument as error:
            refused = from_engine(error, self.constrained_by)
            if refused.param == "prompt":
                refused.param = self.prompt_field
            if refused.param == "tools":
                refused.message, refused.param = name_parameters(refused.message)
            raise refused from None

    def _calls(self) -> list[_Call]:
        # The engine scores a prompt for the first of its answers alone, but every answer may have to repeat it.
        most = 1 if "prompt_logprobs" in self.options else MAX_ANSWERS
        calls = []
        for number, prompt in enumerate(self.prompts):
            for first in range(0, len(self.seeds), most):
                count = min(most, len(self.seeds) - first)
                options = self.options if count == 1 else {**self.options, "n": count}
                seed = self.seeds[first]
                if seed is not None:
                    options = {**options, "seed": seed}
                calls.append(_Call(prompt, options, number * len(self.seeds) + first))
        return calls


@dataclass(frozen=True)
class _Call:
    """A request to the engine, for one answer or several; `first` is the index of its first one."""

    prompt: Prompt
    options: dict[str, Any]
    first: int


async def _one(client: AsyncLightLLMClient, call: _Call) -> list[Generation]:
    return [await client.generate(call.prompt, **call.options)]


class Usage:
    """Counts the tokens of a request: those of a prompt once, also for several answers."""

    def __init__(self, num_copies: int) -> None:
        self._num_copies = num_copies
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0

    def add(self, index: int, part: Chunk | Generation) -> None:
        prompt = index // self._num_copies
        self._prompt_tokens[prompt] = part.num_input_tokens
        if index % self._num_copies == 0:  # the other answers share what the first has computed
            self._cached_tokens[prompt] = part.num_cached_tokens
        self._completion_tokens += part.num_output_tokens

    def as_json(self) -> dict[str, Any]:
        prompt_tokens = sum(self._prompt_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }


async def _all(calls: Sequence[Coroutine[Any, Any, list[Generation]]]) -> list[list[Generation]]:
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(streams: Sequence[AsyncChunkStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield the chunks of several streams, with the stream's index; raise the first error of any."""
    ready: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncChunkStream) -> None:
        try:
            async for chunk in stream:
                await ready.put((index, chunk))
            await ready.put((index, None))
        except Exception as error:  # noqa: BLE001 (whoever reads the queue raises it)
            await ready.put((index, error))

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(streams)
    try:
        while num_open:
            index, item = await ready.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
