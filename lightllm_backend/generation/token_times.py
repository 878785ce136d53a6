# SPDX-License-Identifier: Apache-2.0
"""TokenTimes: the times of one request's tokens, for the metrics. No torch."""

from __future__ import annotations

import time
from typing import Protocol

from lightllm_backend.request import TokenChunk


class Observer(Protocol):
    """Learns when things happen to requests: the metrics."""

    def first_token(self, seconds: float, queue_seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, status: str, seconds: float) -> None: ...


class TokenTimes:
    """Measures one request from its construction to its last chunk."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._has_tokens = False
        self._started = self._last_token = time.monotonic()

    def observe(self, chunk: TokenChunk) -> None:
        """Take the time of a chunk that the engine has made."""
        now = time.monotonic()
        if chunk.token_ids:
            if self._has_tokens:
                self._observer.next_token((now - self._last_token) / len(chunk.token_ids))
            else:
                self._observer.first_token(now - self._started, chunk.queue_seconds or 0.0)
            self._has_tokens, self._last_token = True, now
        if chunk.finish_reason is not None:
            self._observer.finished(chunk.finish_reason.value, now - self._started)
