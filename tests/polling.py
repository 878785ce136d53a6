# SPDX-License-Identifier: Apache-2.0
"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def poll(condition: Callable[[], object], limit: float = 60.0, every: float = 0.01) -> bool:
    """Whether the condition becomes true within `limit` seconds, asked at intervals of `every` seconds.

    The limit is for a machine that is busy with other things: only a failure waits for it.
    """
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
