# SPDX-License-Identifier: Apache-2.0
"""StatisticsLog: the worker's line of statistics. No torch."""

from __future__ import annotations

import logging
import time

from lightllm_backend.router.statistics import EngineStats

log = logging.getLogger("lightllm.worker")


class StatisticsLog:
    """Logs a line every `interval` seconds (0: never) in which there was something to tell.

    That is a token a second at least: a probe of the launch command, every 20 seconds, is no news.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last, self._since = EngineStats(), time.monotonic()

    def update(self, stats: EngineStats) -> None:
        """Take the newest counters, and log a line if it is time."""
        now = time.monotonic()
        seconds = now - self._since
        if self._interval == 0 or seconds < self._interval:
            return
        prompt_tokens = (stats.prompt_tokens_total - self._last.prompt_tokens_total) / seconds
        generated_tokens = (stats.generated_tokens_total - self._last.generated_tokens_total) / seconds
        if max(prompt_tokens, generated_tokens, stats.running_requests, stats.queued_requests) >= 1:
            log.info(
                "%d running, %d queued, %d of %d KV tokens used (%.0f %%), %.0f prompt and %.0f generated tokens/s",
                stats.running_requests,
                stats.queued_requests,
                stats.kv_tokens_used,
                stats.kv_tokens_total,
                100 * stats.kv_tokens_used / stats.kv_tokens_total,
                prompt_tokens,
                generated_tokens,
            )
        self._last, self._since = stats, now
