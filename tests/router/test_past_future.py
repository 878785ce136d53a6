# SPDX-License-Identifier: Apache-2.0
"""Which lengths the past makes likely."""

from __future__ import annotations

import numpy as np
import pytest

from lightllm_backend.router.admission import Demand, Gate
from lightllm_backend.router.past_future import DRAWS, RESERVE, WINDOW, PastFutureAdmission
from lightllm_backend.router.router import Router
from tests.router.fake_engine import make_request, submit


def demand(policy: PastFutureAdmission, made: list[int], most: list[int]) -> Demand:
    """Of sequences that hold 10 slots and have made so many tokens of so many."""
    made_, most_ = np.array(made), np.array(most)
    return Demand(
        np.full(len(made), 10), most_ - made_, made_, most_, np.array([policy.draw_quantiles() for _ in made]),
        np.zeros(len(made), dtype=np.int64),
    )  # fmt: skip


def experienced(lengths: list[int]) -> PastFutureAdmission:
    policy = PastFutureAdmission()
    for index in range(WINDOW):
        policy.record_length(lengths[index % len(lengths)])
    return policy


def test_without_a_past_everybody_takes_all() -> None:
    policy = PastFutureAdmission()
    assert policy.steps_left(demand(policy, [0, 3], [100, 50])).tolist() == [[100, 47]] * DRAWS
    policy.record_length(5)  # one short answer is not yet a distribution
    likely = policy.steps_left(demand(policy, [0] * 200, [100] * 200))
    assert np.isin(likely, [5, 100]).all()
    assert (likely == 100).mean() > 0.95


def test_only_lengths_are_drawn_that_are_longer_than_what_is_made() -> None:
    policy = experienced([10, 20, 30, 40])
    for made, possible in [(0, {10, 20, 30, 40}), (10, {20, 30, 40}), (29, {30, 40}), (39, {40}), (40, {90})]:
        left = policy.steps_left(demand(policy, [made] * 100, [90] * 100))
        assert set((left + made).ravel().tolist()) == possible


def test_nobody_is_expected_to_take_more_than_it_asks_for() -> None:
    policy = experienced([500])
    assert (policy.steps_left(demand(policy, [3], [20])) == 17).all()


def test_the_past_is_forgotten() -> None:
    policy = experienced([500])
    for _ in range(WINDOW):
        policy.record_length(7)
    assert (policy.steps_left(demand(policy, [0], [900])) == 7).all()


def test_draws_are_spread_like_the_past_and_alike_in_every_process() -> None:
    policy, twin = experienced(list(range(1, 101))), experienced(list(range(1, 101)))
    sequences = [0] * 2000, [1000] * 2000
    left = policy.steps_left(demand(policy, *sequences))
    assert left.shape == (DRAWS, 2000)
    assert left.mean() == pytest.approx(50.5, abs=1.5)
    assert not np.array_equal(left[0], left[1])
    assert np.array_equal(left, twin.steps_left(demand(twin, *sequences)))


def test_the_worst_draw_must_fit_and_a_part_stays_in_reserve() -> None:
    policy = experienced([10])
    nobody = demand(policy, [], [])._replace(quantiles=np.empty((0, DRAWS)))
    # Each holds 10 slots and takes 10 more at the same time.
    gate = Gate(policy, nobody)
    candidates = sum(gate.admits(demand(policy, [0], [900]), 1000) for _ in range(100))
    assert candidates == int(1000 * (1 - RESERVE)) // 20
    undecided = experienced([10, 900])
    gate = Gate(undecided, nobody)
    low, high = np.full((1, DRAWS), 0.0), np.full((1, DRAWS), 0.0)
    high[0, -1] = 0.99
    assert gate.admits(demand(undecided, [0], [900])._replace(quantiles=high), 2000)
    assert gate.admits(demand(undecided, [0], [900])._replace(quantiles=high), 2000)
    assert not gate.admits(demand(undecided, [0], [900])._replace(quantiles=high), 2000)
    assert gate.admits(demand(undecided, [0], [900])._replace(quantiles=low), 2000)


def test_alone_everybody_has_room() -> None:
    policy = PastFutureAdmission()
    gate = Gate(policy, demand(policy, [], [])._replace(quantiles=np.empty((0, DRAWS))))
    assert gate.admits(demand(policy, [0], [90]), 100)  # 100 slots, and 5 % of them are in reserve
    assert not gate.admits(demand(policy, [0], [1]), 100)


@pytest.mark.parametrize(("ignore_eos", "at_once"), [(False, 2), (True, 1)])
def test_an_answer_that_no_eos_ends_is_counted_in_full(ignore_eos: bool, at_once: int) -> None:
    """Whether both arrive together or the first runs already."""
    for steps_between in (0, 1):
        router = Router(100, 8, 100, max_queue_size=9, eos_ids=frozenset({2}), policy=experienced([9]))
        batches = []
        for uid in ("a", "b"):
            submit(router, make_request(uid, 10, max_tokens=60, ignore_eos=ignore_eos))
            if uid == "b" or steps_between:
                batches.append(router.next_batch())
        assert sum(len(batch.admitted) for batch in batches if batch) == at_once
