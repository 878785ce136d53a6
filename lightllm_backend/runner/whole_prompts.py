# SPDX-License-Identifier: Apache-2.0
"""Finds the prompts of a step of which nothing is cached, for a kernel that is made for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kernels.attention.whole_prompts import TILE_TOKENS, WholePrompts
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.staging import Staging

# Of the tiles, which share is given out by size alone, so that all end together.
_LAST = 0.3


def whole_prompts(batch: Batch, staging: Staging) -> WholePrompts | None:
    """None: there are none."""
    tiles = whole_prompt_tiles(batch.starts, batch.lengths, batch.num_decodes)
    if not len(tiles):
        return None
    [uploaded] = staging.upload(tiles.ravel())
    return WholePrompts(uploaded.view(tiles.shape), are_all=bool((batch.starts[batch.num_decodes :] == 0).all()))


def whole_prompt_tiles(starts: NDArray[np.int32], lengths: NDArray[np.int32], num_decodes: int) -> NDArray[np.int32]:
    """The tiles of a step's sequences, which have `starts` [n] cached and `lengths` [n] new tokens; those that decode
    come first. [m, 3], see WholePrompts.

    Tiles of a prompt follow each other, so that its K and V are found in the cache, longest prompts first; the last
    ones of all are ordered by how many keys they see.
    """
    first = np.cumsum(lengths) - lengths
    chosen = np.flatnonzero(starts == 0)
    chosen = chosen[chosen >= num_decodes]
    chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
    counts = -(-lengths[chosen] // TILE_TOKENS)
    prompt = np.repeat(chosen, counts)
    number = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(counts.sum())
    tail = int((1 - _LAST) * len(number))
    keys = np.minimum(lengths[prompt], (number + 1) * TILE_TOKENS)
    order = np.concatenate([np.arange(tail), tail + np.argsort(-keys[tail:], kind="stable")])
    tiles: NDArray[np.int32] = np.stack([first[prompt], lengths[prompt], number], 1)[order].astype(np.int32)
    return tiles
