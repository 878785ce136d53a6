# SPDX-License-Identifier: Apache-2.0
"""The token slot allocator against a set of held slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm_backend.kv_pool.allocator import TokenSlotAllocator


def test_a_fresh_pool_gives_each_slot_once_from_its_beginning() -> None:
    allocator = TokenSlotAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert first.dtype == np.int32
    assert first.tolist() == [0, 1]
    assert second.tolist() == [2, 3, 4]
    assert allocator.available == 0


def test_more_than_is_available_is_an_invariant() -> None:
    allocator = TokenSlotAllocator(5)
    allocator.allocate(3)
    with pytest.raises(AssertionError, match="3 token slots asked for, 2 are free"):
        allocator.allocate(3)
    assert allocator.available == 2


def test_what_is_allocated_does_not_change_when_it_is_freed_and_reused() -> None:
    allocator = TokenSlotAllocator(4)
    slots = allocator.allocate(3)
    before = slots.tolist()
    allocator.free(slots[1:])
    allocator.free(slots[:1])
    allocator.allocate(4)
    assert slots.tolist() == before


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_random_use_never_gives_a_slot_twice(actions: list[tuple[bool, int]]) -> None:
    allocator = TokenSlotAllocator(20)
    held: list[int] = []
    for is_allocate, count in actions:
        if is_allocate:
            slots = allocator.allocate(min(count, allocator.available)).tolist()
            assert not set(slots) & set(held)
            held += slots
        else:
            freed, held = held[:count], held[count:]
            allocator.free(np.array(freed, dtype=np.int32))
        assert allocator.available == 20 - len(held)
        allocator.check(np.array(held, dtype=np.int32))


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_check_sees_lost_doubled_and_foreign_slots(wrong: list[int]) -> None:
    allocator = TokenSlotAllocator(6)
    allocator.check(allocator.allocate(3))
    with pytest.raises(AssertionError):
        allocator.check(np.array(wrong, dtype=np.int32))


def test_freeing_more_than_is_held_is_an_invariant() -> None:
    allocator = TokenSlotAllocator(3)
    slots = allocator.allocate(2)
    allocator.free(slots)
    with pytest.raises(AssertionError, match="only 0 are held"):
        allocator.free(slots)
