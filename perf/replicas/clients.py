# SPDX-License-Identifier: Apache-2.0
"""The clients of the chaos test: over gRPC and OpenAI's API, streaming and not, with a prefix key and without.

Each request is asked until it has its answer. The library's own retries are counted, and how often they did not help:
an answer that broke off in the middle, or one that was refused to the last retry, is asked for again from here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import Counter
from dataclasses import dataclass, field

import httpx

from lightllm_client import AsyncLightLLMClient, LightLLMError, Options, Unavailable
from lightllm_client.retries import FIRST_PAUSE_SECONDS, MAX_RETRIES

WAYS = ("gRPC stream", "gRPC whole", "OpenAI stream", "OpenAI whole")
PROMPTS = tuple(f"The capital of {name} is" for name in ("Japan", "France", "Italy", "Peru", "Kenya", "Norway"))
ATTEMPTS = 6  # of a request by its caller, each with the retries of the library
ANSWER_SECONDS = 300.0  # for one attempt; an answer that takes longer is lost
RETRIED_STATUS = (429, 500, 502, 503, 504)  # by the openai package, as are connections that fail


class Cut(Exception):
    """The answer broke off, or the request was refused to the last retry: the caller was told, and asks again."""


class Wrong(Exception):
    """The answer is not what was asked for, or the error is none that a retry cures."""


@dataclass
class Tally:
    """How requests ended."""

    done: int = 0
    retries: int = 0  # by the library
    told: Counter[str] = field(default_factory=Counter)  # what callers heard who then asked again
    lost: list[str] = field(default_factory=list)  # requests without an answer, or with a wrong one


class _RetryCounter(logging.Handler):
    """Counts what the client library says of its retries."""

    def __init__(self, clients: Clients) -> None:
        super().__init__(logging.INFO)
        self._clients = clients

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        self._clients.tally.retries += 1


class Clients:
    """`concurrency` requests at once, from `start` to `stop`. `tally` is replaced by whoever begins a new count.

    openai_port: None asks over gRPC alone.
    expected: the text of the answer to each prompt; without it, only the number of tokens is checked.
    """

    def __init__(
        self,
        grpc_url: str,
        openai_port: int | None,
        concurrency: int,
        max_tokens: int,
        expected: dict[str, str] | None = None,
    ) -> None:
        self.tally = Tally()
        self._grpc = AsyncLightLLMClient(grpc_url, timeout=ANSWER_SECONDS)
        self._ways = WAYS if openai_port else tuple(way for way in WAYS if way.startswith("gRPC"))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._http = httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=limits, trust_env=False)
        self._completions = f"http://127.0.0.1:{openai_port}/v1/completions"
        self._concurrency, self._max_tokens, self._expected = concurrency, max_tokens, expected
        self._numbers = itertools.count()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._counter = _RetryCounter(self)

    async def start(self) -> None:
        log = logging.getLogger("lightllm_client")
        log.setLevel(logging.INFO)
        log.addHandler(self._counter)
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._concurrency)]

    async def stop(self) -> None:
        """Wait for the answers to what has been asked."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        logging.getLogger("lightllm_client").removeHandler(self._counter)
        await self._grpc.aclose()
        await self._http.aclose()

    async def _ask_on(self) -> None:
        while not self._stopping:
            number = next(self._numbers)
            try:
                await self._ask(number)
                self.tally.done += 1
            except (Cut, Wrong, LightLLMError, ValueError, LookupError) as error:
                way = self._ways[number % len(self._ways)]
                self.tally.lost.append(f"request {number}, {way}: {type(error).__name__}: {error}")

    async def _ask(self, number: int) -> None:
        way, prompt = self._ways[number % len(self._ways)], PROMPTS[number % len(PROMPTS)]
        key = prompt if number % 3 else None
        for attempt in range(1, ATTEMPTS + 1):
            try:
                asked = self._ask_grpc if way.startswith("gRPC") else self._ask_openai
                return await asked(prompt, key, way.endswith("stream"))
            except Cut as cut:
                if attempt == ATTEMPTS:
                    raise
                self.tally.told[f"{way}: {cut}"] += 1
        raise AssertionError("unreachable")

    async def _ask_grpc(self, prompt: str, key: str | None, streaming: bool) -> None:
        options: Options = {"max_tokens": self._max_tokens, "ignore_eos": True, "temperature": 0.0}
        texts, count = [], 0
        try:
            if streaming:
                async for chunk in self._grpc.stream(prompt, prefix_key=key, **options):
                    texts.append(chunk.text)
                    count += chunk.num_output_tokens
            else:
                answer = await self._grpc.generate(prompt, prefix_key=key, **options)
                texts, count = [answer.text], answer.num_output_tokens
        except Unavailable as error:
            raise Cut("cut" if count else "refused") from error
        except LightLLMError as error:
            raise Wrong(f"after {count} tokens: {error}") from None
        self._check(prompt, "".join(texts), count)

    async def _ask_openai(self, prompt: str, key: str | None, streaming: bool) -> None:
        """As the openai package does: repeated after a status of its list, or without a connection."""
        body: dict[str, object] = {"prompt": prompt, "max_tokens": self._max_tokens, "ignore_eos": True}
        body |= {"temperature": 0, "stream": streaming, **({"prompt_cache_key": key} if key else {})}
        if streaming:
            body["stream_options"] = {"include_usage": True}
        for retry in range(MAX_RETRIES + 1):
            data = b""
            try:
                async with self._http.stream("POST", self._completions, json=body) as response:
                    async for part in response.aiter_bytes():
                        data += part
                if response.status_code == httpx.codes.OK:
                    break
                if response.status_code not in RETRIED_STATUS:
                    raise Wrong(f"status {response.status_code}: {data[:200]!r}")
            except httpx.TimeoutException as error:
                raise Wrong(f"no answer: {error!r}") from None
            except httpx.TransportError as error:
                if data:
                    raise Cut("cut") from error
            if retry == MAX_RETRIES:
                raise Cut("refused")
            self.tally.retries += 1
            await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**retry)
        if not streaming:
            answer = json.loads(data)
            return self._check(prompt, answer["choices"][0]["text"], answer["usage"]["completion_tokens"])
        events = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line]
        answers = [json.loads(event) for event in events[:-1]]  # the last one may be a piece
        failures = [answer["error"] for answer in answers if "error" in answer]
        if any(failure["code"] != "unavailable" for failure in failures):
            raise Wrong(f"{failures}")
        if failures or events[-1:] != [b"[DONE]"]:
            raise Cut("cut")
        text = "".join(choice["text"] for answer in answers for choice in answer["choices"])
        return self._check(prompt, text, answers[-1]["usage"]["completion_tokens"])

    def _check(self, prompt: str, text: str, count: int) -> None:
        if count != self._max_tokens:
            raise Wrong(f"{count} tokens came; asked for: {self._max_tokens}")
        if self._expected is not None and text != self._expected[prompt]:
            raise Wrong(f"{text!r} came; expected: {self._expected[prompt]!r}")
