# SPDX-License-Identifier: Apache-2.0
"""What the host tells a kernel that is made for prompts of which nothing is cached."""

from typing import NamedTuple

from torch import Tensor

# Queries of a tile.
TILE_TOKENS = 128


class WholePrompts(NamedTuple):
    """Tiles of queries, in the order in which they are best computed. Each is the place of its prompt's first token
    among the new ones of the step, the prompt's length, and its number within the prompt."""

    tiles: Tensor  # [m, 3] int32
    are_all: bool  # no prompt has cached tokens
