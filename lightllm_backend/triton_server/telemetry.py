# SPDX-License-Identifier: Apache-2.0
"""Telemetry: whoever learns what happens to requests: the metrics and, if the settings ask for them, log and spans."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightllm_backend.config import EngineConfig
from lightllm_backend.generation.token_times import EndedRequest, Identity
from lightllm_backend.request import RequestError
from lightllm_backend.triton_server.metrics import STATUS_OF_REFUSAL, Metrics
from lightllm_backend.triton_server.request_log import RequestLog

if TYPE_CHECKING:
    from lightllm_backend.triton_server.tracing import RequestSpans

MAX_WAITING = 10_000  # requests whose lines and spans are still to be written; more are left out
CLOSE_SECONDS = 2.0  # for those that wait when the process ends

log = logging.getLogger("lightllm")


class Telemetry:
    """The Observer of a process's requests. Only the metrics are told of single tokens.

    Log and spans are written in a thread of their own, since whoever reads the log may be slow.
    """

    def __init__(self, metrics: Metrics, config: EngineConfig, model: str) -> None:
        """model: its name for clients."""
        self.metrics = metrics
        self.first_token = metrics.first_token
        self.next_token = metrics.next_token
        self._log = None if config.log_requests == "none" else RequestLog(config.log_requests)
        self._shows_prompts = config.log_prompts
        self._spans = _spans(config.trace_url, model) if config.trace_url else None
        self._waiting: queue.Queue[tuple[EndedRequest, int] | None] = queue.Queue(MAX_WAITING)
        self._writer = threading.Thread(target=self._write, name="telemetry", daemon=True)
        if self._log or self._spans:
            self._writer.start()

    def identity(self, request: Any, tenant: str, prompt: Callable[[], str]) -> Identity:
        """Return the identity of a request of Triton server. prompt: makes its text, for logs that are to have it."""
        context = request.trace().get_context() if self._spans else None
        shown = prompt if self._log and self._shows_prompts else None
        return Identity(request.request_id(), tenant, context or "", shown)

    def finished(self, ended: EndedRequest) -> None:
        """A request that was submitted has ended."""
        self.metrics.finished(ended)
        self._put(ended)

    def refused(self, request: Any, error: Exception) -> None:
        """A request ended before it was submitted: with an error of its own or the server's, or its time was up."""
        self.metrics.refused(error)
        if self._log:
            code = error.code if isinstance(error, RequestError) else "INTERNAL"
            self._put(EndedRequest(STATUS_OF_REFUSAL[code], 0.0, Identity(request.request_id()), code))

    def close(self) -> None:
        """Carry over and send what is left, and stop all threads."""
        self.metrics.close()
        if self._writer.is_alive():
            self._waiting.put(None)
            self._writer.join(CLOSE_SECONDS)
        if self._spans:
            self._spans.close()

    def _put(self, ended: EndedRequest) -> None:
        if self._log or self._spans:
            try:
                self._waiting.put_nowait((ended, time.time_ns()))
            except queue.Full:
                pass  # the log and the spans have a gap, which is better than a request that waits for them

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            ended, end = item
            try:
                if self._log:
                    self._log.finished(ended)
                if self._spans:
                    self._spans.finished(ended, end)
            except Exception:
                log.exception("log and spans of request %s are incomplete", ended.identity.id)


def _spans(url: str, model: str) -> RequestSpans:
    from lightllm_backend.triton_server.tracing import RequestSpans  # imports OpenTelemetry, which is optional

    return RequestSpans(url, model)
