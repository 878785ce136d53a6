# SPDX-License-Identifier: Apache-2.0
"""TokenTimes: the times of one request's tokens, for whoever observes requests. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightllm_backend.request import TokenChunk


@dataclass(frozen=True)
class Identity:
    """Names a request and its client in logs and traces."""

    id: str = ""  # the client's, else the engine's
    tenant: str = ""
    trace_context: str = ""  # of the span above its own, as a JSON object of headers; empty: it is not traced
    prompt: Callable[[], str] | None = None  # makes its text; None: logs do not show it

    @property
    def trace_id(self) -> str:
        """The id in the trace context; empty if it has none."""
        parts = json.loads(self.trace_context or "{}").get("traceparent", "").split("-")
        return parts[1] if len(parts) == 4 else ""


NOBODY = Identity()


@dataclass(frozen=True)
class EndedRequest:
    """What there is to tell of a request that has ended. Seconds count from its submission."""

    status: str  # the finish reason
    seconds: float
    identity: Identity = NOBODY
    error_code: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, from the prefix cache
    num_answer_tokens: int = 0
    queue_seconds: float | None = None  # None: it was not admitted, or ended before its first token
    first_token_seconds: float | None = None  # None: there was no token


class Observer(Protocol):
    """Learns when things happen to requests: the telemetry."""

    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, ended: EndedRequest) -> None: ...


class TokenTimes:
    """Measures one request from its construction to its last chunk."""

    def __init__(self, observer: Observer, identity: Identity = NOBODY) -> None:
        self._observer = observer
        self._identity = identity
        self._started = self._last_token = time.monotonic()
        self._num_answer_tokens = self._num_prompt_tokens = self._num_cached_tokens = 0
        self._queue_seconds: float | None = None
        self._first_token_seconds: float | None = None

    def observe(self, chunk: TokenChunk) -> None:
        """Take the time of a chunk that the engine has made."""
        now = time.monotonic()
        if chunk.token_ids:
            if self._first_token_seconds is not None:
                self._observer.next_token((now - self._last_token) / len(chunk.token_ids))
            else:
                self._take_first(chunk, now - self._started)
            self._last_token = now
            self._num_answer_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self._observer.finished(
                EndedRequest(
                    chunk.finish_reason.value,
                    now - self._started,
                    self._identity,
                    chunk.error.code if chunk.error else "",
                    # The last chunk of an engine that is gone has no prompt tokens.
                    self._num_prompt_tokens or chunk.num_prompt_tokens,
                    self._num_cached_tokens or chunk.num_cached_tokens,
                    self._num_answer_tokens,
                    self._queue_seconds,
                    self._first_token_seconds,
                )
            )

    def _take_first(self, chunk: TokenChunk, seconds: float) -> None:
        self._first_token_seconds, self._queue_seconds = seconds, chunk.queue_seconds or 0.0
        self._num_prompt_tokens, self._num_cached_tokens = chunk.num_prompt_tokens, chunk.num_cached_tokens
        self._observer.first_token(seconds, self._queue_seconds)
