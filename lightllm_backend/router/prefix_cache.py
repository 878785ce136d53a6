# SPDX-License-Identifier: Apache-2.0
"""PrefixCache: a radix tree of token sequences whose K and V are in the pool.

Each node has a run of token ids and their slots. A running sequence holds the nodes from the root to the point where
its own tokens leave the tree; a held node is never evicted. When the pool needs slots, the cache evicts nodes without a
holder: leaves first, the least recently used before others.

If tenants have their caches apart, each has a tree of its own. They share the pool and the order of eviction.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(eq=False, slots=True)
class Node:
    """A run of tokens in the tree."""

    token_ids: Ids  # [n], n > 0 except in the root
    slots: Ids  # [n]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)  # by their first token id
    holders: set[int] = field(default_factory=set)  # rows of the request table
    last_used: int = 0

    def path(self) -> Iterator[Node]:
        """This node and its ancestors, without the root, upwards."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class _TenantRoot(Node):
    """The root of one tenant's tree. Other than a Node, it may be referenced weakly."""


# An entry of the heap of leaves: `last_used`, a unique number that breaks ties, and the node.
_Leaf = tuple[int, int, Node]
# The heap drops stale entries when it has twice its live entries and this many more: rare, so cheap per entry.
MAX_STALE = 1000


class PrefixCache:
    """Owns the slots of all nodes and counts their holders.

    After `find`, call `hold` before any other method: others may evict what was found.
    """

    def __init__(self, num_rows: int) -> None:
        self._root = Node(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32), None)
        # By tenant. A root lives as long as it has children, or a row that it is the end of.
        self._tenant_roots: WeakValueDictionary[Hashable, Node] = WeakValueDictionary()
        self._leaves: list[_Leaf] = []  # a heap; some entries are stale
        self._clock = itertools.count(1)
        self._entries = itertools.count()
        self._max_leaves = MAX_STALE
        self.num_evictable = 0  # tokens of nodes without a holder
        self.num_shared = 0  # tokens of nodes with at least two holders
        self.shared = np.zeros(num_rows, dtype=np.int64)  # [rows] how many of those tokens each row holds

    @property
    def root(self) -> Node:
        return self._root

    def root_of(self, tenant: Hashable) -> Node:
        """The root of this tenant's own tree."""
        root = self._tenant_roots.get(tenant)
        if root is None:
            root = self._tenant_roots[tenant] = _TenantRoot(self._root.token_ids, self._root.slots, None)
        return root

    def find(self, token_ids: Ids, root: Node | None = None) -> tuple[Node, int]:
        """The node at which the longest cached beginning of these tokens ends, and the length of that beginning."""
        node, length = root or self._root, 0
        while length < len(token_ids):
            child = node.children.get(int(token_ids[length]))
            if child is None:
                break
            common = _common_length(child.token_ids, token_ids[length:])
            node = child if common == len(child.token_ids) else self._split(child, common)
            length += common
        return node, length

    def hold(self, end: Node, row: int) -> None:
        """Make the row a holder of the path that ends at `end`."""
        for node in end.path():
            size, num_others = len(node.token_ids), len(node.holders)
            if num_others == 0:
                self.num_evictable -= size
            elif num_others == 1:
                self.shared[list(node.holders)] += size
                self.num_shared += size
            if num_others > 0:
                self.shared[row] += size
            node.holders.add(row)

    def release(self, end: Node, row: int) -> None:
        """Undo `hold`: the row is no longer a holder of the path."""
        now = next(self._clock)
        for node in end.path():
            size = len(node.token_ids)
            node.holders.remove(row)
            node.last_used = now
            if len(node.holders) == 0:
                self.num_evictable += size
                self._push_leaf(node)
            elif len(node.holders) == 1:
                self.shared[list(node.holders)] -= size
                self.num_shared -= size
        self.shared[row] = 0

    def extend(self, end: Node, row: int, token_ids: Ids, slots: Ids) -> Node:
        """Add a running row's tokens after its path, and return the new end of the path.

        If the tree already continues with the same first token, with slots of its own, the row keeps its tokens.
        """
        if len(token_ids) == 0 or int(token_ids[0]) in end.children:
            return end
        node = self._append(end, token_ids, slots)
        node.holders.add(row)
        return node

    def insert(self, end: Node, token_ids: Ids, slots: Ids) -> Ids:
        """Add the tokens after the path of a row that ends. Return the slots of tokens that the tree already has."""
        node, length = end, 0
        while length < len(token_ids):
            child = node.children.get(int(token_ids[length]))
            if child is None:
                leaf = self._append(node, token_ids[length:], slots[length:])
                leaf.last_used = next(self._clock)
                self.num_evictable += len(leaf.token_ids)
                self._push_leaf(leaf)
                break
            common = _common_length(child.token_ids, token_ids[length:])
            length += common
            node = child if common == len(child.token_ids) or length == len(token_ids) else self._split(child, common)
        return slots[:length]

    def evict(self, count: int) -> Ids:
        """Evict tokens without a holder and return their `count` slots."""
        assert count <= self.num_evictable, f"{count} slots are to be evicted, {self.num_evictable} may be"
        evicted: list[Ids] = []
        missing = count
        while missing > 0:
            leaf = self._leaves[0][-1]
            if not _is_up_to_date(self._leaves[0]):
                heapq.heappop(self._leaves)
                continue
            kept = max(0, len(leaf.token_ids) - missing)
            evicted.append(leaf.slots[kept:])
            missing -= len(leaf.token_ids) - kept
            leaf.token_ids, leaf.slots, first = leaf.token_ids[:kept], leaf.slots[:kept], int(leaf.token_ids[0])
            if kept == 0:
                heapq.heappop(self._leaves)
                parent, leaf.parent = leaf.parent, None
                assert parent is not None, "an evictable node is in the tree"
                del parent.children[first]
                self._push_leaf(parent)
        slots: Ids = np.concatenate([np.empty(0, dtype=np.int32), *evicted])
        self.num_evictable -= len(slots)
        return slots

    def drop(self, tenant: Hashable) -> Ids:
        """Evict this tenant's tree, of which nobody holds a node, and return its slots."""
        root = self._tenant_roots.pop(tenant, None)
        waiting: list[Node] = [root] if root else []
        dropped = [self._root.slots]
        while waiting:
            node = waiting.pop()
            assert not node.holders, "a tree is dropped while it is in use"
            waiting.extend(node.children.values())
            dropped.append(node.slots)
            node.children, node.parent = {}, None
        slots: Ids = np.concatenate(dropped)
        self.num_evictable -= len(slots)
        return slots

    def nodes(self) -> Iterator[Node]:
        """All nodes except roots, parents before children."""
        roots = [self._root, *self._tenant_roots.values()]
        waiting = [child for root in roots for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check(self) -> None:
        """Assert that the tree is consistent and the counts are right. For tests."""
        shared = np.zeros_like(self.shared)
        evictable = total_shared = 0
        for node in self.nodes():
            assert node.parent is not None, "a node in the tree has a parent"
            assert len(node.token_ids) == len(node.slots) > 0, "a node has a slot for each token"
            assert node.parent.children[int(node.token_ids[0])] is node, "a node is not where it is looked for"
            assert node.parent.parent is None or node.holders <= node.parent.holders, "a path has a gap"
            evictable += len(node.token_ids) if not node.holders else 0
            if len(node.holders) > 1:
                total_shared += len(node.token_ids)
                shared[list(node.holders)] += len(node.token_ids)
        assert (evictable, total_shared) == (self.num_evictable, self.num_shared), "the tokens are miscounted"
        assert np.array_equal(shared, self.shared), "what rows share is miscounted"

    def _append(self, parent: Node, token_ids: Ids, slots: Ids) -> Node:
        # Copies, since the row's next owner overwrites its arrays.
        node = Node(token_ids.copy(), slots.copy(), parent)
        parent.children[int(token_ids[0])] = node
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Split the node and return the new upper half. Existing references to `node` now refer to the lower half."""
        parent = node.parent
        assert parent is not None, "the root has no tokens"
        upper = Node(node.token_ids[:length], node.slots[:length], parent, {}, set(node.holders), node.last_used)
        parent.children[int(node.token_ids[0])] = upper
        node.token_ids, node.slots, node.parent = node.token_ids[length:], node.slots[length:], upper
        upper.children[int(node.token_ids[0])] = node
        return upper

    def _push_leaf(self, node: Node) -> None:
        """Put the node on the heap if it may be evicted. Clear stale entries when there are too many."""
        if node.children or node.holders or node.parent is None:
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._entries), node))
        if len(self._leaves) > self._max_leaves:
            up_to_date = {entry[-1]: entry for entry in self._leaves if _is_up_to_date(entry)}
            self._leaves = sorted(up_to_date.values())
            self._max_leaves = 2 * len(self._leaves) + MAX_STALE


def _is_up_to_date(leaf: _Leaf) -> bool:
    last_used, _, node = leaf
    is_evictable = not node.holders and not node.children and node.parent is not None
    return is_evictable and node.last_used == last_used


def _common_length(one: Ids, other: Ids) -> int:
    length = min(len(one), len(other))
    different = (one[:length] != other[:length]).nonzero()[0]
    return int(different[0]) if len(different) else length
