# SPDX-License-Identifier: Apache-2.0
"""Whose the token slots are: free, a running sequence's own, or the prefix cache's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.allocator import TokenSlotAllocator
from lightllm_backend.router.admission import Forecast
from lightllm_backend.router.prefix_cache import Node, PrefixCache
from lightllm_backend.router.request_table import RequestTable


class Prefix(NamedTuple):
    """What the cache has of a candidate's tokens."""

    end: Node
    length: int
    num_shared: int  # tokens that several sequences hold already

    def slots(self) -> NDArray[np.int32]:
        return np.concatenate([np.empty(0, dtype=np.int32), *[node.slots for node in self.end.path()][::-1]])


class SlotPool:
    """Hands out slots, and takes back what rows of the request table hold.

    The first slots of a row are the cache's, which others may use at the same time; the rest are its own. What a row
    gives back goes to the cache, which gives it up when slots are needed.
    """

    def __init__(self, capacity: int, table: RequestTable, with_cache: bool) -> None:
        self.capacity = capacity
        self._table = table
        self._with_cache = with_cache
        self._allocator = TokenSlotAllocator(capacity)
        num_rows = len(table.owners)
        self._cache = PrefixCache(num_rows)
        self._ends = [self._cache.root] * num_rows  # by row: the last node that it holds
        self._num_cached = np.zeros(num_rows, dtype=np.int64)  # by row: slots that are the cache's

    @property
    def available(self) -> int:
        """Slots that no running sequence holds."""
        return self._allocator.available + self._cache.num_evictable

    @property
    def num_evictable(self) -> int:
        """Slots that only the cache holds."""
        return self._cache.num_evictable

    @property
    def plannable(self) -> int:
        """The slots that admission may plan with, which are those that no two sequences hold at a time.

        The others count as held for ever, since nobody knows who of their holders will be the last.
        """
        return self.capacity - self._cache.num_shared

    @property
    def shared(self) -> NDArray[np.int64]:
        """By row, the slots that it holds and others as well."""
        return self._cache.shared

    def allocate(self, count: int) -> NDArray[np.int32]:
        missing = count - self._allocator.available
        if missing > 0:
            in_advance = self.capacity // 1000  # so that not each chunk of a step has to
            self._allocator.free(self._cache.evict(min(missing + in_advance, self._cache.num_evictable)))
        return self._allocator.allocate(count)

    def find(self, token_ids: NDArray[np.int32]) -> Prefix:
        """The longest beginning of these tokens that need not be computed. At least the last must be."""
        if not self._with_cache:
            return Prefix(self._cache.root, 0, 0)
        end, length = self._cache.find(token_ids[:-1])
        return Prefix(end, length, sum(len(node.token_ids) for node in end.path() if len(node.holders) > 1))

    def hold(self, row: int, prefix: Prefix) -> None:
        """The row starts with this prefix."""
        self._cache.hold(prefix.end, row)
        self._ends[row], self._num_cached[row] = prefix.end, prefix.length

    def publish(self, row: int) -> None:
        """Others may use what the row has planned so far: later steps may, and this one, which writes K and V first."""
        if self._with_cache:
            first = self._num_cached[row]
            slots = self._table.slots_of(row)[first:]
            token_ids = self._table.known_token_ids(row)[first : first + len(slots)]
            end = self._cache.extend(self._ends[row], row, token_ids, slots)
            if end is not self._ends[row]:
                self._ends[row], self._num_cached[row] = end, first + len(slots)

    def release(self, row: int) -> None:
        """Takes back what the row holds."""
        end, first = self._ends[row], self._num_cached[row]
        slots = self._table.slots_of(row)[first:]
        if self._with_cache:
            # A token whose slot is planned may still be unknown where more than one step is in flight.
            token_ids = self._table.known_token_ids(row)[first:][: len(slots)]
            superfluous = self._cache.give(end, token_ids, slots[: len(token_ids)])
            slots = np.concatenate([superfluous, slots[len(token_ids) :]])
        self._allocator.free(slots)
        self._cache.let_go(end, row)
        self._ends[row], self._num_cached[row] = self._cache.root, 0

    def clear_cache(self) -> None:
        """Gives up all that no running sequence holds."""
        self._allocator.free(self._cache.evict(self._cache.num_evictable))

    def peak(self, batch_max_tokens: int) -> int:
        """The most slots that the sequences with a row will hold at once if each takes all that it asks for. For tests.

        A slot that several hold is held until the last of them ends.
        """
        remaining = self._table.remaining.copy()
        held = self._table.cached - self._num_cached
        rows = [row for row, owner in enumerate(self._table.owners) if owner is not None]
        for row in rows:
            if not self._table.decoding[row]:
                owner = self._table.owners[row]
                steps = -(-(owner.known_length - int(self._table.cached[row])) // batch_max_tokens)
                held[row] += owner.known_length - steps - self._table.cached[row]
                remaining[row] += steps
        for node in self._cache.nodes():
            if node.holders:
                held[max(node.holders, key=lambda row: remaining[row])] += len(node.token_ids)
        return Forecast(held[rows], remaining[rows]).peak

    def check(self) -> None:
        """Asserts that each slot is free, a row's own or the cache's, and exactly one of them. For tests."""
        rows = [row for row, owner in enumerate(self._table.owners) if owner is not None]
        own = [self._table.slots_of(row)[self._num_cached[row] :] for row in rows]
        cached = [node.slots for node in self._cache.nodes()]
        self._allocator.check(np.concatenate([np.empty(0, dtype=np.int32), *own, *cached]))
        self._cache.check()
        for row in rows:
            path = Prefix(self._ends[row], 0, 0).slots()
            assert np.array_equal(path, self._table.slots_of(row)[: self._num_cached[row]]), (
                "a row's slots are not its path's"
            )
