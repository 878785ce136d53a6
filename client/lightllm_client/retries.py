# SPDX-License-Identifier: Apache-2.0
"""When a request that the server could not take is sent again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from lightllm_client.errors import InvalidArgument, LightLLMError, Unavailable

log = logging.getLogger("lightllm_client")

MAX_RETRIES = 2
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 8.0  # before the jitter; the pause doubles with each retry
JITTER = 0.25  # a pause is shortened by up to this share, so that clients do not return all at once


class Retries:
    """The retries that one request has left.

    Only Unavailable is worth a retry, and only while the caller has received nothing of the answer: call `stop` with
    the first chunk. The timeout covers all attempts and the pauses between them.
    """

    def __init__(
        self,
        max_retries: int,
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._left = max_retries
        self._pause = FIRST_PAUSE_SECONDS
        self._clock, self._draw = clock, draw
        self._end = None if timeout is None else clock() + timeout

    def stop(self) -> None:
        """Allow no further retry."""
        self._left = 0

    def seconds_left(self) -> float | None:
        """Return the timeout of the next attempt in seconds, or None if there is none."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def pause_after(self, error: LightLLMError) -> float | None:
        """Return how many seconds to wait before the next attempt, or None if this error is final."""
        if not isinstance(error, Unavailable) or self._left <= 0:
            return None
        pause = self._pause * (1.0 - JITTER * self._draw())
        left = self.seconds_left()
        if left is not None and pause >= left:
            return None
        self._left -= 1
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        log.info("a request is sent again in %.1f s, after %s", pause, error)
        return pause


def check_max_retries(max_retries: int) -> int:
    """Return the number; raise InvalidArgument if it is none."""
    if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
        raise InvalidArgument(f"max_retries is {max_retries!r}; allowed: a whole number ≥ 0")
    return max_retries
