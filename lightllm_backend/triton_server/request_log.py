# SPDX-License-Identifier: Apache-2.0
"""RequestLog: a line in the log for each request that has ended. No torch."""

from __future__ import annotations

import logging

from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.logs import facts

# Statuses that the setting `log_requests` selects.
LOGGED = {"none": (), "failed": ("failed", "rejected"), "all": ("stop", "length", "cancelled", "failed", "rejected")}

log = logging.getLogger("lightllm.request")


class RequestLog:
    """Writes the lines that the setting `log_requests` asks for. None has text of a client, unless that is asked for.

    An error's message may quote a request, so a line has the error's code alone.
    """

    def __init__(self, log_requests: str) -> None:
        self._statuses = frozenset(LOGGED[log_requests])

    def finished(self, ended: EndedRequest) -> None:
        if ended.status not in self._statuses:
            return
        identity = ended.identity
        values = {
            "request_id": identity.id,
            "tenant": identity.tenant,
            "status": ended.status,
            "prompt_tokens": ended.num_prompt_tokens,
            "cached_tokens": ended.num_cached_tokens,
            "answer_tokens": ended.num_answer_tokens,
            "queue_seconds": _rounded(ended.queue_seconds),
            "first_token_seconds": _rounded(ended.first_token_seconds),
            "seconds": _rounded(ended.seconds),
        }
        if ended.error_code:
            values["error"] = ended.error_code
        if identity.trace_id:
            values["trace_id"] = identity.trace_id
        if identity.prompt is not None:
            values["prompt"] = identity.prompt()
        log.log(logging.WARNING if ended.status == "failed" else logging.INFO, "request ended", extra=facts(**values))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
