# SPDX-License-Identifier: Apache-2.0
"""Which token slots of the KV pool are free. It knows numbers only: the tensors are in storage.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class TokenSlotAllocator:
    """A stack of free token slots. Any free slot serves any token, so nothing is ever fragmented.

    Allocating and freeing cost O(count). Asking for more than is available is a bug of the caller, because admission
    is exact; so is freeing a slot twice, which only `check` can see.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, capacity
        self.capacity = capacity
        # The first `available` entries are the free slots. Descending, so that a fresh pool is used from its beginning.
        self._stack: NDArray[np.int32] = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self.available = capacity

    def allocate(self, count: int) -> NDArray[np.int32]:
        """`count` slots that nobody holds, [count]; the caller owns the array."""
        assert 0 <= count <= self.available, f"{count} token slots asked for, {self.available} are free"
        top = self.available
        self.available = top - count
        return self._stack[top - count : top][::-1].copy()

    def free(self, slots: NDArray[np.int32]) -> None:
        """Takes slots back, in any order and grouping."""
        top = self.available + len(slots)
        assert top <= self.capacity, (
            f"{len(slots)} token slots freed, but only {self.capacity - self.available} are held"
        )
        self._stack[self.available : top] = slots[::-1]
        self.available = top

    def check(self, held: NDArray[np.int32]) -> None:
        """Asserts that the free slots and the held ones are each slot of the pool exactly once."""
        every_slot = np.concatenate([self._stack[: self.available], held])
        assert np.array_equal(np.sort(every_slot), np.arange(self.capacity)), (
            f"{self.available} free and {len(held)} held token slots are not the {self.capacity} of the pool"
        )
