# SPDX-License-Identifier: Apache-2.0
"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def poll(condition: Callable[[], object], limit: float = 60.0, every: float = 0.01) -> bool:
    """Whether the condition becomes true within `limit` seconds, asked at intervals of `every` seconds at first.

    The intervals grow to a twentieth of what has been waited, since to ask takes processor time from what is awaited.
    The limit is for a machine that is busy with other things: only a failure waits for it.
    """
    begun = time.monotonic()
    while not condition():
        waited = time.monotonic() - begun
        if waited > limit:
            return False
        time.sleep(max(every, waited / 20))
    return True
