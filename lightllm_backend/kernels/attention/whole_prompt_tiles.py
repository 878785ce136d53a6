# SPDX-License-Identifier: Apache-2.0
"""The work list of prefill_attention_hopper: tiles of the prompts without cached tokens."""

from typing import NamedTuple

from torch import Tensor

# The queries of one head that a tile holds.
TILE_QUERIES = 128


class WholePromptTiles(NamedTuple):
    """Query tiles of whole prompts (those without cached tokens), in launch order.

    A row of `tiles` is (index of the prompt's first token among the step's new tokens, length of the prompt, number of
    the tile within the prompt).
    """

    tiles: Tensor  # [m, 3] int32, on the device
    are_all: bool  # the step has no prompt with cached tokens
