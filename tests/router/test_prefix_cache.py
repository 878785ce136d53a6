# SPDX-License-Identifier: Apache-2.0
"""The radix tree by itself: what it finds, whom it counts, and what it gives up first."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightllm_backend.router.prefix_cache import MAX_STALE, Node, PrefixCache

NUM_ROWS = 4


def ids(text: str) -> NDArray[np.int32]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


class Tree:
    """A cache whose slots say which beginning of a text they belong to, so that a wrong one is seen."""

    def __init__(self) -> None:
        self.cache = PrefixCache(NUM_ROWS)
        self.meaning: dict[int, str] = {}  # by slot: the text up to its token
        self.ends: dict[int, tuple[Node, str]] = {}  # by row: what it holds
        self._slots = itertools.count()

    def new_slots(self, text: str, start: int) -> NDArray[np.int32]:
        slots = [next(self._slots) for _ in text[start:]]
        self.meaning.update({slot: text[: start + index + 1] for index, slot in enumerate(slots)})
        return np.array(slots, dtype=np.int32)

    def find(self, text: str) -> str:
        """The beginning that is found; its slots are the right ones."""
        end, length = self.cache.find(ids(text))
        slots = [slot for node in [*end.path()][::-1] for slot in node.slots.tolist()]
        assert [self.meaning[slot] for slot in slots] == [text[: index + 1] for index in range(length)]
        return text[:length]

    def begin(self, row: int, text: str) -> None:
        self.find(text)
        end, length = self.cache.find(ids(text))
        self.cache.hold(end, row)
        end = self.cache.extend(end, row, ids(text[length:]), self.new_slots(text, length))
        self.ends[row] = end, text

    def finish(self, row: int, generated: str = "") -> None:
        end, text = self.ends.pop(row)
        whole = text + generated
        held = sum(len(node.token_ids) for node in end.path())
        slots = self.new_slots(whole, held)
        duplicates = self.cache.insert(end, ids(whole[held:]), slots)
        assert set(duplicates.tolist()) <= set(slots.tolist())
        for slot in duplicates.tolist():
            del self.meaning[slot]
        self.cache.release(end, row)

    def add(self, text: str) -> None:
        self.begin(0, text)
        self.finish(0)

    def evict(self, count: int) -> list[str]:
        """The texts whose last token is given up."""
        return [self.meaning.pop(slot) for slot in self.cache.evict(count).tolist()]


def test_the_longest_beginning_is_found() -> None:
    tree = Tree()
    assert tree.find("abc") == ""
    tree.add("abcdef")
    tree.add("abcxyz")
    assert [tree.find(text) for text in ("abcdef", "abcdefg", "abcxq", "abz", "b", "")] == [
        "abcdef", "abcdef", "abcx", "ab", "", "",
    ]  # fmt: skip
    tree.cache.check()
    assert tree.cache.num_evictable == 9, "what is alike is there once"


def test_what_a_row_generates_is_found_after_its_end_only() -> None:
    tree = Tree()
    tree.begin(0, "abc")
    assert tree.find("abcdef") == "abc"
    tree.finish(0, generated="de")
    assert tree.find("abcdef") == "abcde"


def test_who_shares_what_is_counted() -> None:
    tree = Tree()
    tree.begin(0, "abcdef")
    tree.begin(1, "abcxy")
    assert (tree.cache.num_evictable, tree.cache.num_shared) == (0, 3)
    assert tree.cache.shared.tolist() == [3, 3, 0, 0]
    tree.begin(2, "abcdeq")
    assert (tree.cache.num_shared, tree.cache.shared.tolist()) == (5, [5, 3, 5, 0])
    tree.finish(0)
    assert (tree.cache.num_evictable, tree.cache.num_shared, tree.cache.shared.tolist()) == (1, 3, [0, 3, 3, 0])
    tree.finish(2)
    tree.finish(1)
    assert (tree.cache.num_evictable, tree.cache.num_shared, tree.cache.shared.any()) == (9, 0, False)


def test_the_ends_of_the_oldest_branches_go_first() -> None:
    tree = Tree()
    for text in ("abcd", "abxy", "mn"):
        tree.add(text)
    tree.add("abcd")  # used again
    assert tree.evict(1) == ["abxy"]
    assert tree.evict(2) == ["abx", "mn"]
    assert tree.evict(1) == ["m"]
    assert tree.find("abcdef") == "abcd"
    assert sorted(tree.evict(4)) == ["a", "ab", "abc", "abcd"]
    assert tree.cache.num_evictable == 0
    assert list(tree.cache.nodes()) == []


def test_what_is_held_stays() -> None:
    tree = Tree()
    tree.begin(1, "abc")
    tree.add("abcdef")
    tree.add("xyz")
    assert tree.cache.num_evictable == 6
    assert sorted(tree.evict(6)) == ["abcd", "abcde", "abcdef", "x", "xy", "xyz"]
    assert tree.find("abcdef") == "abc"
    tree.finish(1)
    assert tree.cache.num_evictable == 3


def test_two_that_compute_the_same_at_a_time_leave_it_once() -> None:
    tree = Tree()
    tree.begin(0, "ab")
    tree.begin(1, "ab")
    tree.finish(0, generated="cdef")
    tree.finish(1, generated="cdxy")
    assert [tree.find("abcdef"), tree.find("abcdxy")] == ["abcdef", "abcdxy"]
    tree.cache.check()
    assert tree.cache.num_evictable == len(tree.meaning) == 8


def test_uses_without_end_do_not_pile_up() -> None:
    tree = Tree()
    for number in range(5 * MAX_STALE):
        tree.add("abcdef" if number % 2 else "abcxyz")
    assert len(tree.cache._leaves) <= MAX_STALE + 3
    assert len(tree.evict(9)) == 9


texts = st.text("ab", min_size=1, max_size=7)
actions = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, NUM_ROWS - 1), texts),
    st.tuples(st.just("finish"), st.integers(0, NUM_ROWS - 1), st.text("ab", max_size=4)),
    st.tuples(st.just("evict"), st.integers(1, 6), st.just("")),
)


@settings(deadline=None)
@given(st.lists(actions, max_size=40))
def test_random_use(life: list[tuple[str, int, str]]) -> None:
    tree = Tree()
    for action, number, text in life:
        if action == "begin" and number not in tree.ends:
            tree.begin(number, text)
            assert tree.find(text) == text
        elif action == "finish" and number in tree.ends:
            whole = tree.ends[number][1] + text
            tree.finish(number, text)
            assert tree.find(whole) == whole
        elif action == "evict":
            count = min(number, tree.cache.num_evictable)
            assert len(tree.evict(count)) == count
        tree.cache.check()
        in_tree = [slot for node in tree.cache.nodes() for slot in node.slots.tolist()]
        assert sorted(in_tree) == sorted(tree.meaning), "a slot is lost or is there twice"
        for _, text_held in tree.ends.values():
            assert tree.find(text_held) == text_held
