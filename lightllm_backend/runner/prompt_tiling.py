# SPDX-License-Identifier: Apache-2.0
"""Orders the tiles of a step's whole prompts (those without cached tokens) for prefill_attention_hopper."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kernels.attention.whole_prompt_tiles import TILE_QUERIES, WholePromptTiles
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.staging import Staging

# The last 30 % of tiles are issued largest-first to balance the tail; perf.tile_order times other shares.
TAIL_SHARE = 0.3


def tile_whole_prompts(batch: Batch, staging: Staging) -> WholePromptTiles | None:
    """The tiles of a step's whole prompts, on the device; None if the step has no such prompt."""
    tiles = order_tiles(batch.starts, batch.lengths, batch.num_decodes)
    if not len(tiles):
        return None
    [uploaded] = staging.upload(tiles.ravel())
    return WholePromptTiles(uploaded.view(tiles.shape), are_all=bool((batch.starts[batch.num_decodes :] == 0).all()))


def order_tiles(
    starts: NDArray[np.int32], lengths: NDArray[np.int32], num_decodes: int, tail_share: float = TAIL_SHARE
) -> NDArray[np.int32]:
    """The tiles [m, 3] (see WholePromptTiles) of sequences with `starts` [n] cached and `lengths` [n] new tokens, of
    which the first `num_decodes` decode.

    Longest prompts come first. Tiles of one prompt are adjacent, so its K and V stay in the L2 cache; only the tail is
    ordered by the number of keys that a tile sees.
    """
    first = np.cumsum(lengths) - lengths
    chosen = np.flatnonzero(starts == 0)
    chosen = chosen[chosen >= num_decodes]
    chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
    counts = -(-lengths[chosen] // TILE_QUERIES)
    prompt = np.repeat(chosen, counts)
    number = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(counts.sum())
    tail = int((1 - tail_share) * len(number))
    keys = np.minimum(lengths[prompt], (number + 1) * TILE_QUERIES)
    order = np.concatenate([np.arange(tail), tail + np.argsort(-keys[tail:], kind="stable")])
    tiles: NDArray[np.int32] = np.stack([first[prompt], lengths[prompt], number], 1)[order].astype(np.int32)
    return tiles
