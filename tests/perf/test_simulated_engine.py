# SPDX-License-Identifier: Apache-2.0
"""The simulation tells the time that can be counted by hand, and fills the pool as the design asks."""

from __future__ import annotations

import numpy as np
import pytest

from lightllm_backend.router.router import Router
from perf.admission import pool_use, service, simulate
from perf.lengths import DATA, Lengths, conversation_lengths
from perf.simulated_engine import EOS_ID, KV_TOKEN_MS, PROMPT_TOKEN_MS, SEQUENCE_MS, STEP_MS, simulate_alone


def test_two_requests_by_hand() -> None:
    lengths, arrivals = [Lengths(10, 3), Lengths(5, 1)], [0.0, 7.0]
    outcome = simulate_alone(
        lambda clock: Router(100, 4, 50, 10, frozenset({EOS_ID}), clock=clock), 4, lengths, arrivals, max_tokens=9
    )
    # A prefill of 10, then three decodes, the last in vain because the EOS is noticed one step late; then the other.
    steps = [PROMPT_TOKEN_MS * 10 + KV_TOKEN_MS * 10, *(SEQUENCE_MS + KV_TOKEN_MS * held for held in (11, 12, 13))]
    others = [PROMPT_TOKEN_MS * 5 + KV_TOKEN_MS * 5, SEQUENCE_MS + KV_TOKEN_MS * 6]
    seconds = (STEP_MS + np.array(steps + others)) / 1e3
    assert outcome.durations == pytest.approx(seconds)
    assert outcome.first_token_seconds == pytest.approx([seconds[0], seconds[4]])
    assert outcome.seconds == pytest.approx(7.0 + seconds[4])
    assert outcome.output_tokens == 4
    assert outcome.pool_shares == pytest.approx([0.1, 0.11, 0.12, 0.13, 0.05, 0.06])


def test_the_pool_is_full_until_the_queue_is_empty() -> None:
    lengths = conversation_lengths(DATA / "workload_2000.csv")
    assert sum(lengths[0]) == 662
    row = pool_use(121_060, simulate(121_060, lengths))
    assert row["steps"] > 1000
    assert row["share_by_step"] >= 0.97


def test_recent_lengths_admit_more_than_what_is_asked_for() -> None:
    lengths = conversation_lengths(DATA / "workload_1000.csv")
    exact, estimated, known = (
        service(60_000, policy, simulate(60_000, lengths, policy=policy))
        for policy in ("exact", "past_future", "lengths known")
    )
    assert exact["preemptions"] == known["preemptions"] == 0
    assert exact["share_by_step"] + 0.1 < estimated["share_by_step"] < known["share_by_step"]
    assert exact["output_tokens_per_second"] < estimated["output_tokens_per_second"]
    assert estimated["ttft_p50"] < exact["ttft_p50"]
