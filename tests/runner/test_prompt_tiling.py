# SPDX-License-Identifier: Apache-2.0
"""Into which tiles prompts are cut of which nothing is cached."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lightllm_backend.kernels.attention.whole_prompt_tiles import TILE_QUERIES
from lightllm_backend.runner.prompt_tiling import order_tiles


def _int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def test_each_tile_of_whole_prompts_is_there_once() -> None:
    starts, lengths = _int32(9, 0, 0, 0, 40, 0, 0), _int32(1, 1, 1, 300, 500, 128, 129)
    tiles = order_tiles(starts, lengths, num_decodes=2)
    assert tiles.dtype == np.int32
    assert sorted(map(tuple, tiles.tolist())) == [
        (2, 1, 0), (3, 300, 0), (3, 300, 1), (3, 300, 2), (803, 128, 0), (931, 129, 0), (931, 129, 1)
    ]  # fmt: skip


def test_long_prompts_begin_and_tiles_with_few_keys_end() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 50).astype(np.int32)
    tiles = order_tiles(np.zeros_like(lengths), lengths, num_decodes=0)
    keys = np.minimum(tiles[:, 1], (tiles[:, 2] + 1) * TILE_QUERIES)
    assert tiles[0, 1] == lengths.max()
    last = keys[-len(keys) // 4 :]
    assert (np.diff(last) <= 0).all()


@pytest.mark.parametrize(("starts", "decodes"), [((5, 7), 1), ((3,), 1), ((0,), 1)])
def test_there_may_be_none(starts: tuple[int, ...], decodes: int) -> None:
    assert order_tiles(_int32(*starts), np.ones(len(starts), np.int32), decodes).shape == (0, 3)
