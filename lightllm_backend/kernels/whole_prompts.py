# SPDX-License-Identifier: Apache-2.0
"""What the host tells a kernel that is made for prompts of which nothing is cached."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Queries of a tile.
TILE_TOKENS = 128
# Of the tiles, which share is given out by size alone, so that all end together.
_LAST = 0.3


class WholePrompts(NamedTuple):
    tiles: Tensor  # [m, 3] int32, see whole_prompt_tiles
    are_all: bool  # no prompt has cached tokens


def whole_prompt_tiles(starts: NDArray[np.int32], lengths: NDArray[np.int32], num_decodes: int) -> NDArray[np.int32]:
    """The tiles of queries of a step's prompts without cached tokens, [m, 3], in the order in which to compute them.

    Sequences have `starts` [n] cached and `lengths` [n] new tokens, and those that decode come first. A tile is the
    place of its prompt's first token among the new ones, the prompt's length, and its number within the prompt.
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
