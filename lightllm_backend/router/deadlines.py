# SPDX-License-Identifier: Apache-2.0
"""Deadlines: finds the requests whose deadline has passed."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from lightllm_backend.router.sequence import Sequence


class Deadlines:
    """A heap of deadlines. Ended requests stay in it until it holds too many of them, or none is left that runs."""

    def __init__(self, live: Mapping[str, Sequence]) -> None:
        self._live = live  # the Router's sequences that have not ended, by uid
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, uid: str) -> None:
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (deadline, uid))

    def passed(self, now: float) -> Iterator[Sequence]:
        """Remove the deadlines up to `now` and yield their sequences that have not ended."""
        if not self._live:
            self._heap.clear()
        while self._heap and self._heap[0][0] <= now:
            deadline, uid = heapq.heappop(self._heap)
            sequence = self._live.get(uid)
            if sequence is not None and sequence.request.deadline == deadline:
                yield sequence
