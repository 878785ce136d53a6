# SPDX-License-Identifier: Apache-2.0
"""How full the KV pool will get, known before a sequence is let in. Pure functions of arrays.

From step to step each sequence takes one more token slot until it ends and gives all of them back. Between two ends the
demand only grows, so its peak lies at a step in which some sequence takes its last slot. With the sequences sorted by
the steps that they have left, longest first, those still alive when sequence i ends are 1 … i, and each has by then
taken as many more slots as i has steps left:

    peak = max over i of (remaining_i · i + held_1 + … + held_i)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def peak_tokens(held: NDArray[np.int64], remaining: NDArray[np.int64]) -> int:
    """The most token slots that these sequences will hold at once, now or later.

    held [n]: token slots now; remaining [n]: slots that each will still take, one a step.
    """
    if len(held) == 0:
        return 0
    longest_first = np.argsort(remaining)[::-1]
    alive = np.arange(1, len(held) + 1, dtype=np.int64)
    return int((remaining[longest_first] * alive + np.cumsum(held[longest_first])).max())


def admissible(
    held: NDArray[np.int64],
    remaining: NDArray[np.int64],
    new_held: NDArray[np.int64],
    new_remaining: NDArray[np.int64],
    capacity: int,
) -> int:
    """How many of the newcomers, in their order, may join so that the peak stays within capacity.

    A newcomer never lowers the peak, so the answer is found by bisection. The first is tried alone before: where the
    pool is full, which is the common case under load, the answer is 0 and costs one evaluation.
    """

    def fits(count: int) -> bool:
        joined_held = np.concatenate([held, new_held[:count]])
        joined_remaining = np.concatenate([remaining, new_remaining[:count]])
        return peak_tokens(joined_held, joined_remaining) <= capacity

    if len(new_held) == 0 or not fits(1):
        return 0
    fitting, too_many = 1, len(new_held) + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting
