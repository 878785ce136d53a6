# SPDX-License-Identifier: Apache-2.0
"""When the next step is planned: as late as the device is not kept waiting.

So a request that comes while a step runs takes part in the next one, instead of waiting for one more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lightllm_backend.router.batch import Batch

# How much later than foreseen the next step may be launched: a thread wakes up late, planning takes longer.
MARGIN_SECONDS = 0.15e-3
# Steps and launches that are remembered: few, so that what has changed is soon forgotten.
REMEMBERED = 8


class LaunchTimer:
    """Foresees when the oldest step in flight ends, and rather too early than too late.

    A step takes no less than the shortest of the last steps that only decoded, and no more sequences than it has. Where
    there were not two of them, as after the batch has shrunk or for prompts alone, nothing is foreseen. A result that
    was there as soon as the next step was launched says that it was launched too late; then all is measured anew.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._decodes: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # sequences and seconds of a step
        self._launches: deque[float] = deque(maxlen=REMEMBERED)  # seconds of planning and launching one
        self._in_flight: deque[Batch] = deque()
        self._busy_since = 0.0  # since when the device has worked on the oldest of them
        self._planning_since = self._launched_at = 0.0
        self._may_wait = False

    def planning(self) -> None:
        """A step is planned from now on."""
        self._planning_since = self._clock()

    def launched(self, batch: Batch, all_admitted: bool) -> None:
        """It is on its way. Who comes while others wait for admission gains nothing from a late plan."""
        self._launched_at = self._clock()
        self._launches.append(self._launched_at - self._planning_since)
        if not self._in_flight:
            self._busy_since = self._launched_at
        self._in_flight.append(batch)
        self._may_wait = all_admitted

    def finished(self) -> None:
        """The oldest step's result is there."""
        now = self._clock()
        batch = self._in_flight.popleft()
        if now - self._launched_at < MARGIN_SECONDS / 2:
            self._decodes.clear()
        elif batch.num_decodes == len(batch.rows):
            self._decodes.append((batch.num_decodes, now - self._busy_since))
        self._busy_since = now

    def spare_seconds(self) -> float:
        """For how long the next step need not be planned yet."""
        if not self._in_flight or not self._may_wait:
            return 0.0
        most = self._in_flight[0].num_decodes
        measured = [seconds for decodes, seconds in self._decodes if decodes <= most]
        if len(measured) < 2:
            return 0.0
        latest = self._busy_since + min(measured) - max(self._launches) - MARGIN_SECONDS
        return max(0.0, latest - self._clock())
