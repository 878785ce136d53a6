# SPDX-License-Identifier: Apache-2.0
"""SlotPool: tracks the owner of each token slot: free, a running sequence, or the prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.allocator import TokenSlotAllocator
from lightllm_backend.router.admission import Forecast
from lightllm_backend.router.prefix_cache import Node, PrefixCache
from lightllm_backend.router.request_table import RequestTable


class Prefix(NamedTuple):
    """The beginning of a candidate's tokens that the prefix cache holds."""

    end: Node
    length: int
    num_shared: int = 0  # tokens that at least two sequences already hold
    num_sole: int = 0  # tokens that one sequence alone holds so far, the one in row `sole_holder`
    sole_holder: int = 0
    is_kept: bool = False  # whether the sequence's own tokens will join the tree

    def slots(self) -> NDArray[np.int32]:
        return np.concatenate([np.empty(0, dtype=np.int32), *[node.slots for node in self.end.path()][::-1]])


class SlotPool:
    """Allocates token slots to rows of the request table and takes them back.

    The prefix cache owns the first slots of a row, which other rows may share; the row owns the rest. The slots that a
    row releases go to the prefix cache, which evicts them when the pool needs slots.
    """

    def __init__(self, capacity: int, table: RequestTable, with_cache: bool, by_tenant: bool = False) -> None:
        """by_tenant: a tenant finds in the cache only what its own sequences have left there."""
        self.capacity = capacity
        self._table = table
        self._with_cache = with_cache
        self._by_tenant = by_tenant
        self._allocator = TokenSlotAllocator(capacity)
        num_rows = len(table.owners)
        self._cache = PrefixCache(num_rows)
        self._ends = [self._cache.root] * num_rows  # [rows] the last node that the row holds
        self._num_cached = np.zeros(num_rows, dtype=np.int64)  # [rows] slots of the row that the cache owns
        self._is_kept = np.zeros(num_rows, dtype=np.bool_)  # [rows] whether the row's tokens join a tree
        self._generation = 0  # of the trees; nothing is found in those of an earlier one

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
        """The slots that admission may plan with: all but those that at least two sequences hold.

        Shared slots count as held for good, since we cannot know which of their holders will end last.
        """
        return self.capacity - self._cache.num_shared

    @property
    def shared(self) -> NDArray[np.int64]:
        """[rows] how many of each row's slots other rows hold too."""
        return self._cache.shared

    def allocate(self, num_tokens: int) -> NDArray[np.int32]:
        """Take slots for new tokens, [groups, num_tokens]."""
        count = num_tokens * self._table.groups.count
        missing = count - self._allocator.available
        if missing > 0:
            # Evict 0.1 % of the pool in advance, so that one eviction serves all the chunks of a step.
            in_advance = self.capacity // 1000
            self._allocator.free(self._cache.evict(min(missing + in_advance, self._cache.num_evictable)))
        return self._allocator.allocate(count).reshape(self._table.groups.count, num_tokens)

    def give_back(self) -> None:
        """Free what no query of a step to come can see. Whoever gets it next writes it after the steps in flight."""
        if self._table.groups.num_windowed:
            self._allocator.free(self._table.give_back())

    def shared_beside(self, prefix: Prefix) -> NDArray[np.int64]:
        """[rows] how many of each row's slots other rows would hold too if one more began with this prefix."""
        shared = self._cache.shared.copy()
        shared[prefix.sole_holder] += prefix.num_sole
        return shared

    def find(self, token_ids: NDArray[np.int32], tenant: str = "", tree: str = "", is_long: bool = False) -> Prefix:
        """The longest cached beginning of these tokens. It leaves out the last token, which a step must compute.

        tree: if the cache is off, where to look instead; `drop_tree` ends it. is_long: K of the sequence turns as that
        of long ones does, which have trees of their own. Layer groups with a window share nothing, since one sequence
        would give back what another still needs.
        """
        if self._table.groups.num_windowed:
            return Prefix(self._cache.root, 0)
        if self._with_cache:
            tenant = tenant if self._by_tenant else ""
            key = tenant, is_long, self._generation
            root = self._cache.root_of(key) if any(key) else self._cache.root
        elif tree:
            root = self._cache.root_of((tree, is_long))
        else:
            return Prefix(self._cache.root, 0)
        end, length = self._cache.find(token_ids[:-1], root)
        num_shared = num_sole = sole_holder = 0
        for node in end.path():
            if len(node.holders) > 1:
                num_shared += len(node.token_ids)
            elif node.holders:  # the same for all of these, as it holds the way to the root
                num_sole += len(node.token_ids)
                [sole_holder] = node.holders
        return Prefix(end, length, num_shared, num_sole, sole_holder, True)

    def hold(self, row: int, prefix: Prefix) -> None:
        """Let the row begin with this prefix."""
        self._cache.hold(prefix.end, row)
        self._ends[row], self._num_cached[row], self._is_kept[row] = prefix.end, prefix.length, prefix.is_kept

    def publish(self, row: int) -> None:
        """Share the row's planned tokens through the cache.

        Later steps may use them, and so may the current one: it writes all new K and V before it reads any.
        """
        if self._is_kept[row]:
            first = self._num_cached[row]
            slots = self._table.slots_of(row)[first:]
            token_ids = self._table.known_token_ids(row)[first : first + len(slots)]
            end = self._cache.extend(self._ends[row], row, token_ids, slots)
            if end is not self._ends[row]:
                self._ends[row], self._num_cached[row] = end, first + len(slots)

    def release(self, row: int) -> None:
        """Take back all slots of the row."""
        end, first = self._ends[row], self._num_cached[row]
        slots = self._table.slots_of(row)[first:]
        if self._is_kept[row]:
            # With steps in flight, a token may have a slot before its id is known; the cache cannot take it.
            token_ids = self._table.known_token_ids(row)[first:][: len(slots)]
            duplicates = self._cache.insert(end, token_ids, slots[: len(token_ids)])
            slots = np.concatenate([duplicates, slots[len(token_ids) :]])
        self._allocator.free(slots)
        self._cache.release(end, row)
        self._ends[row], self._num_cached[row] = self._cache.root, 0

    def drop_tree(self, tree: str) -> None:
        """Evict what sequences without a cache have shared, once all of them have ended."""
        if not self._with_cache:
            for is_long in (False, True):
                self._allocator.free(self._cache.drop((tree, is_long)))

    def on_free(self, call: Callable[[NDArray[np.int32]], None]) -> None:
        """Call this with the slots whenever some become free."""
        self._allocator.on_free = call

    def clear_cache(self) -> None:
        """Evict all that no running sequence holds."""
        self._allocator.free(self._cache.evict(self._cache.num_evictable))

    def abandon_cache(self) -> None:
        """Let no further sequence find what the cache has; what running sequences hold is evicted after their end."""
        self.clear_cache()
        self._generation += 1

    def peak(self, batch_max_tokens: int) -> int:
        """The peak of the pool if each sequence with a row takes all that it asks for. For tests.

        The holder that ends last is charged for a shared slot.
        """
        if self._table.groups.num_windowed:
            return self._windowed_peak(batch_max_tokens)
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

    def _windowed_peak(self, batch_max_tokens: int) -> int:
        """Step by step: sequences cache a chunk of their prompt or a token each, and those that have ended leave."""
        groups, table = self._table.groups, self._table
        peak = self.capacity - self.available
        rows = [row for row, owner in enumerate(table.owners) if owner is not None]
        alive = [(int(table.cached[row]), table.owners[row].known_length, table.owners[row].max_slots) for row in rows]
        while alive := [one for one in alive if one[0] < one[2]]:
            held, planned = 0, []
            for cached, known, most in alive:
                new = min(known - cached, batch_max_tokens) if cached < known else 1
                in_window = min(cached, groups.window - 1) + new
                held += groups.num_full * (cached + new) + groups.num_windowed * in_window
                planned.append((cached + new, known, most))
            alive, peak = planned, max(peak, held)
        return peak

    def check(self) -> None:
        """Assert that each slot has exactly one owner. For tests."""
        rows = [row for row, owner in enumerate(self._table.owners) if owner is not None]
        own = [self._table.slots_of(row)[self._num_cached[row] :] for row in rows]
        cached = [node.slots for node in self._cache.nodes()]
        self._allocator.check(np.concatenate([np.empty(0, dtype=np.int32), *own, *cached]))
        self._cache.check()
        for row in rows:
            path = Prefix(self._ends[row], 0).slots()
            assert np.array_equal(path, self._table.slots_of(row)[: self._num_cached[row]]), (
                "a row's slots are not its path's"
            )
