# SPDX-License-Identifier: Apache-2.0
"""LayerGroups: which layers share a slot, and how many slots a sequence holds."""

import pytest

from lightllm_backend.kv_pool.layer_groups import ENDLESS, LayerGroups

GEMMA_3_12B = [0 if layer % 6 == 5 else 1024 for layer in range(48)]
GEMMA_2 = [0 if layer % 2 else 4096 for layer in range(42)]


@pytest.mark.parametrize(
    ("windows", "num_full", "num_windowed", "layers_per_slot"),
    [
        ([0] * 32, 1, 0, 32),
        ([4096] * 32, 0, 1, 32),
        (GEMMA_2, 1, 1, 21),
        (GEMMA_3_12B, 1, 5, 8),
        ([0] * 28 + [4096] * 4, 7, 1, 4),
        ([0, 0, 7, 0, 7, 0, 0], 3, 1, 2),  # the last group without a window has one layer
        ([0] * 31 + [4096], 1, 0, 32),  # 32 groups would be too many
        ([32768] * 32, 1, 0, 32),  # no sequence outgrows it
    ],
)
def test_each_layer_has_a_place_of_its_own(
    windows: list[int], num_full: int, num_windowed: int, layers_per_slot: int
) -> None:
    groups = LayerGroups.of(windows, 32768)
    assert (groups.num_full, groups.num_windowed, groups.layers_per_slot) == (num_full, num_windowed, layers_per_slot)
    assert len(set(groups.places)) == len(groups.places) == len(windows)
    assert {group for group, _ in groups.places} == set(range(groups.count))
    if groups.num_windowed:
        assert [group >= groups.num_full for group, _ in groups.places] == [window > 0 for window in windows]
        assert groups.window == max(windows)


def test_windows_of_several_sizes_hold_the_largest() -> None:
    assert LayerGroups.of([0, 512, 4096, 0], 32768).window == 4096


@pytest.mark.parametrize("numbers", [(1, 0, 0), (1, 5, 9), (2, 1, 9), (0, 1, 9)])
def test_the_longest_sequence_is_the_last_that_fits(numbers: tuple[int, int, int]) -> None:
    groups = LayerGroups(*numbers)
    for slots in range(200):
        longest = groups.longest(slots, batch_max_tokens=4)
        assert groups.most_held(longest, 4) <= slots
        assert longest == ENDLESS or groups.most_held(longest + 1, 4) > slots


def test_a_decode_leaves_no_more_than_the_window() -> None:
    groups = LayerGroups(1, 5, 1024)
    assert groups.held(1000) == groups.most_held(1000, 8192) == 6000
    assert groups.held(32768) == 32768 + 5 * 1024
    assert groups.most_held(32768, 8192) == 32768 + 5 * (1023 + 8192)
