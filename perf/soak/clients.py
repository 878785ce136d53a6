# SPDX-License-Identifier: Apache-2.0
"""The clients of the soak: requests of every kind, over gRPC and HTTP, each with exactly one end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from lightllm_client import AsyncLightLLMClient, Cancelled, InvalidArgument, LightLLMError, Unavailable

PROMPTS = ("Once upon a time, there was a", "The capital of Japan is", "List the planets of our solar system: ")
# A request that has no end after so long counts as lost. A server that starts again takes a minute at most.
LOST_SECONDS = 120.0
PROBE_LIMIT_SECONDS = 5.0
LEAVING, BAD = 0.25, 0.03  # shares of the requests
REFUSED_PAUSE_SECONDS = 0.5  # what a well-behaved client does before it asks again


@dataclass(frozen=True)
class End:
    """How one request has ended."""

    request: str
    kind: str
    num_tokens: int = 0
    detail: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.kind in ("wrong", "no end")


@dataclass(frozen=True)
class Ask:
    """One request of the soak."""

    way: str  # "grpc stream", "grpc whole", "http stream", "http whole"
    prompt: str
    max_tokens: int
    leave_after: float | None  # seconds after which the client is gone
    bad: bool  # asks for something that is not allowed

    def __str__(self) -> str:
        leaves = "" if self.leave_after is None else f", leaves after {self.leave_after:.1f} s"
        return f"{self.way}, {len(self.prompt)} characters, {self.max_tokens} tokens{leaves}{', bad' * self.bad}"


class Clients:
    """Asks, and tells `on_end` of each request's end."""

    def __init__(self, http_port: int, grpc_port: int, longest: int, on_end: Callable[[End], None]) -> None:
        self._http_port = http_port
        self._client = AsyncLightLLMClient(f"127.0.0.1:{grpc_port}", max_retries=0)
        self._longest = longest
        self._on_end = on_end

    async def ask_until(self, end: float) -> None:
        """Ask one request after the other until the clock says `end`."""
        while time.monotonic() < end:
            result = await self.ask(self._next())
            self._on_end(result)
            if result.kind in ("refused", "no connection"):
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    async def ask(self, ask: Ask) -> End:
        """Send one request and see it to its end."""
        call = self._grpc(ask) if ask.way.startswith("grpc") else self._http(ask)
        try:
            if ask.leave_after is None:
                return await asyncio.wait_for(call, LOST_SECONDS)
            return await asyncio.wait_for(call, ask.leave_after)
        except asyncio.TimeoutError:
            return End(str(ask), "left" if ask.leave_after is not None else "no end")

    async def probe(self) -> bool:
        """Whether one token comes within PROBE_LIMIT_SECONDS."""
        with contextlib.suppress(LightLLMError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.generate("Hi", max_tokens=1), PROBE_LIMIT_SECONDS)
            return True
        return False

    async def aclose(self) -> None:
        await self._client.aclose()

    def _next(self) -> Ask:
        way = random.choices(["grpc stream", "grpc whole", "http stream", "http whole"], [5, 2, 2, 2])[0]
        prompt = random.choice(PROMPTS) * random.choice([1, 1, 1, 4, 20])
        leave_after = random.expovariate(0.5) if random.random() < LEAVING else None
        return Ask(way, prompt, random.randint(1, self._longest), leave_after, random.random() < BAD)

    async def _grpc(self, ask: Ask) -> End:
        num_tokens = 0
        temperature = -1.0 if ask.bad else 0.0
        try:
            if ask.way == "grpc whole":
                answer = await self._client.generate(
                    ask.prompt, max_tokens=ask.max_tokens, ignore_eos=True, temperature=temperature
                )
                return _done(ask, answer.num_output_tokens)
            stream = self._client.stream(
                ask.prompt, max_tokens=ask.max_tokens, ignore_eos=True, temperature=temperature
            )
            async with stream as chunks:
                async for chunk in chunks:
                    num_tokens += len(chunk.token_ids)
            return _done(ask, num_tokens)
        except InvalidArgument as error:
            return End(str(ask), "bad request refused" if ask.bad else "wrong", detail=str(error))
        except Unavailable as error:
            return End(str(ask), "ended by an error" if num_tokens else "refused", num_tokens, str(error))
        except Cancelled as error:
            return End(str(ask), "wrong", num_tokens, str(error))
        except LightLLMError as error:
            return End(str(ask), "other error", num_tokens, str(error))

    async def _http(self, ask: Ask) -> End:
        streaming = ask.way == "http stream"
        body = {"text_input": ask.prompt, "max_tokens": ask.max_tokens, "ignore_eos": True}
        body |= {"stream": True} if streaming else {}
        body |= {"temperature": -1.0} if ask.bad else {}
        path = "lightllm/generate_stream" if streaming else "lightllm_unary/generate"
        data = json.dumps(body)
        head = (
            f"POST /v2/models/{path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        except OSError as error:
            return End(str(ask), "no connection", detail=str(error))
        try:
            writer.write((head + data).encode())
            text = (await reader.read()).decode(errors="replace")
        except OSError as error:
            return End(str(ask), "connection ended", detail=str(error))
        finally:
            writer.close()
        return http_end(ask, text)


def http_end(ask: Ask, text: str) -> End:
    """Tell from a whole HTTP response how the request has ended: the answer's JSON, or the events of a stream."""
    status = text.split(" ", 2)[1] if text.startswith("HTTP/1.1 ") else ""
    messages = []
    for line in text.split("\n"):  # splitlines would split at some characters of the answers too
        _, brace, rest = line.partition("{")
        with contextlib.suppress(ValueError):
            messages.append(json.loads(brace + rest))
    num_tokens = sum(message.get("num_output_tokens", 0) for message in messages)
    error = next((message["error"] for message in messages if "error" in message), "")
    if "INVALID_ARG" in error:
        return End(str(ask), "bad request refused" if ask.bad else "wrong", detail=error)
    if error:
        known = "UNAVAILABLE" in error
        partial = len(messages) > 1
        return End(str(ask), ("ended by an error" if partial else "refused") if known else "other error", 0, error)
    if not status or not messages or not messages[-1].get("finish_reason"):
        return End(str(ask), "connection ended", detail=text[-200:])
    return _done(ask, num_tokens)


def _done(ask: Ask, num_tokens: int) -> End:
    if ask.bad:
        return End(str(ask), "wrong", num_tokens, "an option that is not allowed was taken")
    if num_tokens != ask.max_tokens:
        return End(str(ask), "wrong", num_tokens, f"{num_tokens} tokens came")
    return End(str(ask), "done", num_tokens)
