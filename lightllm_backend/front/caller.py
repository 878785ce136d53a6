# SPDX-License-Identifier: Apache-2.0
"""The caller of a task's request: its id and its trace go on to Triton server with every call of the engine."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

from lightllm_client import AsyncLightLLMClient


class Caller(NamedTuple):
    """What the front knows of the request that is answered."""

    request_id: str = ""
    trace_headers: tuple[tuple[str, str], ...] = ()  # of W3C Trace Context, as they came


NOBODY = Caller()
# The guard sets it for each request; the tasks that answer the request inherit it.
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


class CallingClient(AsyncLightLLMClient):
    """Calls the engine in the name of the front's own caller."""

    def _identity(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        return CALLER.get()
