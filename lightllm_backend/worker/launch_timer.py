# SPDX-License-Identifier: Apache-2.0
"""LaunchTimer: plans the next step as late as possible without idling the GPU. No torch.

A request that comes while a step runs then joins the next step, instead of waiting for one more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lightllm_backend.router.batch import Batch

# How much later than predicted the next step may be launched, because a thread wakes up late or planning takes longer.
# Half of the first tokens, at 4 requests a second, came 0.3 ms sooner than with 0.3e-3.
MARGIN_SECONDS = 0.15e-3
# Steps and launches that count: few, so that a change of the batch is soon forgotten.
HISTORY = 8


class LaunchTimer:
    """Predicts when the oldest step in flight ends, rather too early than too late.

    Lower bound: the fastest recent decode-only step with at most as many sequences. With fewer than two such steps, as
    after the batch has shrunk, it predicts nothing and the next step is planned at once. A result that is there as soon
    as the next step is launched shows that this launch was too late: then the measurements are dropped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._decodes: deque[tuple[int, float]] = deque(maxlen=HISTORY)  # sequences and seconds of a step
        self._launches: deque[float] = deque(maxlen=HISTORY)  # seconds of planning and launching one
        self._in_flight: deque[Batch] = deque()
        self._busy_since = 0.0  # when the GPU began with the oldest of them
        self._planning_since = self._launched_at = 0.0
        self._may_wait = False

    def planning(self) -> None:
        """The loop begins to plan a step."""
        self._planning_since = self._clock()

    def launched(self, batch: Batch, all_admitted: bool) -> None:
        """The step was launched.

        all_admitted: whether the queue is empty. If it is not, a new request has nothing to gain from a late plan.
        """
        self._launched_at = self._clock()
        self._launches.append(self._launched_at - self._planning_since)
        if not self._in_flight:
            self._busy_since = self._launched_at
        self._in_flight.append(batch)
        self._may_wait = all_admitted

    def finished(self) -> None:
        """The result of the oldest step is there."""
        now = self._clock()
        batch = self._in_flight.popleft()
        if now - self._launched_at < MARGIN_SECONDS / 2:
            self._decodes.clear()
        elif batch.num_decodes == len(batch.rows):
            self._decodes.append((batch.num_decodes, now - self._busy_since))
        self._busy_since = now

    def spare_seconds(self) -> float:
        """How long the loop may wait before it plans the next step."""
        if not self._in_flight or not self._may_wait:
            return 0.0
        most = self._in_flight[0].num_decodes
        measured = [seconds for decodes, seconds in self._decodes if decodes <= most]
        if len(measured) < 2:
            return 0.0
        latest = self._busy_since + min(measured) - max(self._launches) - MARGIN_SECONDS
        return max(0.0, latest - self._clock())
