# SPDX-License-Identifier: Apache-2.0
"""When the next step is planned: as late as the device is not kept waiting.

So a request that comes meanwhile takes part in it, and does not wait for one step more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# What planning may take longer than it did lately, and a message to wake up.
_MARGIN_SECONDS = 0.5e-3
# Waiting has this resolution.
_TICK_SECONDS = 1e-3


class Pace:
    """Knows how long steps and planning took lately. The shortest of some steps counts: one that prefills tells little
    of the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=4)
        self._plans: deque[float] = deque(maxlen=8)
        self._planning_since = self._last_result = clock()
        self._busy_since: float | None = None  # since when the device has worked on the oldest step in flight

    def planning(self) -> None:
        """A step is planned from now on."""
        self._planning_since = self._clock()

    def launched(self) -> None:
        """It is on its way."""
        now = self._clock()
        self._plans.append(now - self._planning_since)
        if self._busy_since is None:
            self._busy_since = now

    def finished(self, more_in_flight: bool) -> None:
        """The oldest step's result is there."""
        now = self._clock()
        if self._busy_since is not None:
            self._steps.append(now - self._busy_since)
        self._busy_since = now if more_in_flight else None

    def spare_seconds(self) -> float:
        """For how long the next step need not be planned yet; 0 where the device is idle, or steps are too short."""
        if self._busy_since is None or len(self._steps) < 2:
            return 0.0
        end = self._busy_since + min(self._steps)
        spare = end - self._clock() - max(self._plans, default=0.0) - _MARGIN_SECONDS
        return max(0.0, spare // _TICK_SECONDS * _TICK_SECONDS)
