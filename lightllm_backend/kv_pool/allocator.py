# SPDX-License-Identifier: Apache-2.0
"""TokenSlotAllocator: tracks which token slots of the KV pool are free. storage.py has their tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class TokenSlotAllocator:
    """A stack of free token slots. Any free slot serves any token, so the pool never fragments.

    `allocate` and `free` cost O(count). To allocate more than is available is a bug of the caller, which preempts or
    waits first; so is to free a slot twice, which only `check` detects.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, capacity
        self.capacity = capacity
        # The first `available` entries are the free slots. They descend, so that a fresh pool fills from slot 0.
        self._stack: NDArray[np.int32] = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self.available = capacity
        self.on_free: Callable[[NDArray[np.int32]], None] | None = None  # gets the slots; for debugging

    def allocate(self, count: int) -> NDArray[np.int32]:
        """Take `count` free slots, [count]. The caller owns the array."""
        assert 0 <= count <= self.available, f"{count} token slots asked for, {self.available} are free"
        top = self.available
        self.available = top - count
        return self._stack[top - count : top][::-1].copy()

    def free(self, slots: NDArray[np.int32]) -> None:
        """Take slots back, in any order and grouping."""
        top = self.available + len(slots)
        assert top <= self.capacity, (
            f"{len(slots)} token slots freed, but only {self.capacity - self.available} are held"
        )
        self._stack[self.available : top] = slots[::-1]
        self.available = top
        if self.on_free is not None:
            self.on_free(slots)

    def check(self, held: NDArray[np.int32]) -> None:
        """Assert that each slot of the pool is either free or in `held`, exactly once. For tests."""
        every_slot = np.concatenate([self._stack[: self.available], held])
        assert np.array_equal(np.sort(every_slot), np.arange(self.capacity)), (
            f"{self.available} free and {len(held)} held token slots are not the {self.capacity} of the pool"
        )
