# SPDX-License-Identifier: Apache-2.0
"""The peak that admission foresees, against a simulation step by step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightllm_backend.router.admission import admissible, peak_tokens

mixes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=12)


def columns(mix: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = np.array(mix, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def simulated_peak(mix: list[tuple[int, int]]) -> int:
    """Lets every sequence take a slot a step, and give all back in the step after its last."""
    alive, peak = list(mix), 0
    while alive:
        peak = max(peak, sum(held for held, _ in alive))
        alive = [(held + 1, remaining - 1) for held, remaining in alive if remaining > 0]
    return peak


def test_a_mix_counted_by_hand() -> None:
    # 4+5+1 now, 5+6+2 after one step, then the third ends: 6+7 and 7+8 when the first takes its last, then 9 … 12.
    assert peak_tokens(*columns([(4, 3), (5, 7), (1, 1)])) == 15


def test_nobody_needs_nothing() -> None:
    assert peak_tokens(*columns([])) == 0


@given(mixes)
def test_the_peak_is_reached_and_never_exceeded(mix: list[tuple[int, int]]) -> None:
    assert peak_tokens(*columns(mix)) == simulated_peak(mix)


@given(mixes, mixes, st.integers(0, 400))
def test_the_longest_prefix_of_newcomers_is_admitted(
    running: list[tuple[int, int]], newcomers: list[tuple[int, int]], capacity: int
) -> None:
    count = admissible(*columns(running), *columns(newcomers), capacity)
    fitting = [
        number for number in range(len(newcomers) + 1) if simulated_peak(running + newcomers[:number]) <= capacity
    ]
    assert count == max(fitting, default=0)
