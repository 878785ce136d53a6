# SPDX-License-Identifier: Apache-2.0
"""The peak that admission foresees, against a simulation step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm_backend.kv_pool.layer_groups import LayerGroups
from lightllm_backend.router.admission import Forecast, WindowedForecast, candidate_demand
from lightllm_backend.router.sequence import Sequence
from tests.router.fake_engine import make_request

sequences = st.tuples(st.integers(0, 40), st.integers(0, 30))
mixes = st.lists(sequences, max_size=12)


def forecast(mix: list[tuple[int, int]]) -> Forecast:
    pairs = np.array(mix, dtype=np.int64).reshape(-1, 2)
    return Forecast(pairs[:, 0], pairs[:, 1])


def simulated_peak(mix: list[tuple[int, int]]) -> int:
    """Lets every sequence take a slot a step, and give all back in the step after its last."""
    alive, peak = list(mix), 0
    while alive:
        peak = max(peak, sum(held for held, _ in alive))
        alive = [(held + 1, remaining - 1) for held, remaining in alive if remaining > 0]
    return peak


def test_a_mix_counted_by_hand() -> None:
    # 4+5+1 now, 5+6+2 after one step, then the third ends: 6+7 and 7+8 when the first takes its last, then 9 … 12.
    assert forecast([(4, 3), (5, 7), (1, 1)]).peak == 15


def test_nobody_needs_nothing() -> None:
    assert forecast([]).peak == 0
    assert forecast([]).peak_with(3, 4) == 7


@given(mixes)
def test_the_peak_is_reached_and_never_exceeded(mix: list[tuple[int, int]]) -> None:
    assert forecast(mix).peak == simulated_peak(mix)


@given(mixes, mixes)
def test_candidates_join_one_by_one(running: list[tuple[int, int]], candidates: list[tuple[int, int]]) -> None:
    with_candidates = forecast(running)
    for number, candidate in enumerate(candidates):
        expected = simulated_peak([*running, *candidates[: number + 1]])
        assert with_candidates.peak_with(*candidate) == expected
        with_candidates.add(*candidate)
        assert with_candidates.peak == expected


grouped = st.builds(LayerGroups, st.integers(0, 2), st.integers(1, 3), st.integers(1, 30))


def windowed_peak(groups: LayerGroups, batch_max_tokens: int, mix: list[tuple[int, int, int]]) -> int:
    """As `simulated_peak`, of sequences that prefill for so many steps, of which each may have all prompt tokens."""
    alive, peak = [(tokens, left, tokens + prefilling, prefilling) for tokens, left, prefilling in mix], 0
    while alive:
        held = 0
        for tokens, _, known, prefilling in alive:
            held += groups.num_full * tokens + groups.num_windowed * min(tokens, groups.window)
            if prefilling >= 0:
                most = min(known, groups.window - 1 + batch_max_tokens) - min(known, groups.window)
                held += groups.num_windowed * most
        peak = max(peak, held)
        alive = [(tokens + 1, left - 1, known, steps - 1) for tokens, left, known, steps in alive if left > 0]
    return peak


@given(grouped, mixes, mixes, sequences, st.integers(0, 5), st.integers(1, 20))
def test_windows_fill_and_then_hold_what_they_have(
    groups: LayerGroups, running: list[tuple[int, int]], joining: list[tuple[int, int]], last: tuple[int, int],
    prefilling: int, batch_max_tokens: int,
) -> None:  # fmt: skip
    """Those that run and those that join decode; the last one joins with its prompt cut."""
    tokens, remaining = np.array(running, dtype=np.int64).reshape(-1, 2).T
    found = WindowedForecast(groups, batch_max_tokens, tokens, remaining)
    mix = [(*one, -1) for one in running]
    assert found.peak == windowed_peak(groups, batch_max_tokens, mix)
    for one in joining:
        found.add(*one)
        mix.append((*one, -1))
        assert found.peak == windowed_peak(groups, batch_max_tokens, mix)
    cut = (last[0], last[1] + prefilling, prefilling)
    assert found.peak_with(*cut) == windowed_peak(groups, batch_max_tokens, [*mix, cut])


# A prompt of 10 tokens and 6 to generate take 15 slots in the end, however many of the 6 are known. What is not planned
# at once takes steps of 3 tokens.
@pytest.mark.parametrize(
    ("generated", "planned", "held"), [(0, 10, 10), (4, 14, 14), (0, 9, 9), (0, 4, 8), (0, 3, 7), (4, 4, 10)]
)
def test_what_a_candidate_takes(generated: int, planned: int, held: int) -> None:
    for ignore_eos in (False, True):
        request = make_request("a", 10, max_tokens=6, ignore_eos=ignore_eos)
        sequence = Sequence(request, handle=0, arrival_index=0, arrival_time=0.0, quantiles=np.zeros(1))
        sequence.known_ids = np.arange(10 + generated)
        demand = candidate_demand(sequence, planned, num_shared=2, batch_max_tokens=3)
        assert (demand.held.item(), demand.remaining.item()) == (held - 2, 15 - held)
        assert (demand.num_generated.item(), demand.max_tokens.item()) == (5 if ignore_eos else generated, 6)
