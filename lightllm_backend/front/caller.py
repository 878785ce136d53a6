# SPDX-License-Identifier: Apache-2.0
"""The caller of a task's request: its id and its trace go on to Triton server with every call of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from lightllm_backend.front.kept_streams import KeptStreams
from lightllm_client import AsyncLightLLMClient


class Caller(NamedTuple):
    """What the front knows of the request that is answered."""

    request_id: str = ""
    trace_headers: tuple[tuple[str, str], ...] = ()  # of W3C Trace Context, as they came


NOBODY = Caller()
# The guard sets it for each request; the tasks that answer the request inherit it.
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


class CallingClient(AsyncLightLLMClient):
    """Calls the engine in the name of the front's own caller, on streams that are kept for later requests."""

    def __init__(self, url: str) -> None:
        # Whether to repeat what is refused is for the front's clients to decide.
        super().__init__(url, max_retries=0)
        self._kept = KeptStreams(lambda: self._connected().ModelStreamInfer())

    def _identity(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        return CALLER.get()

    def _call(self, request: Any, timeout: float | None, metadata: Sequence[tuple[str, str]]) -> Any:
        if timeout is None and not metadata:
            return self._kept.call(request)
        return super()._call(request, timeout, metadata)  # both are of a stream, not of a request
