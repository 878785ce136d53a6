# SPDX-License-Identifier: Apache-2.0
"""Random lives of many requests: every answer is the one that its request gets alone, and the pool is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.request import FinishReason, Request
from lightllm_backend.router.admission import AdmissionPolicy, ExactAdmission, Forecast, WindowedForecast
from lightllm_backend.router.past_future import PastFutureAdmission
from lightllm_backend.router.router import Router
from tests.router.fake_engine import EngineLoop, FakeRunner, expected_answer, make_request, submit
from tests.router.test_preemption import RecklessAdmission

EOS_IDS = frozenset({4, 9})


@dataclass(frozen=True)
class Arrival:
    step: int
    family: int
    prompt_length: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    return_log_probs: bool
    cancelled_after: int | None  # steps after its arrival

    def request(self, uid: str) -> Request:
        return make_request(
            uid, self.prompt_length, self.max_tokens, min_tokens=self.min_tokens, ignore_eos=self.ignore_eos,
            return_log_probs=self.return_log_probs, family=self.family,
        )  # fmt: skip


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 25),
    family=st.integers(0, 2),
    prompt_length=st.integers(1, 25),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    return_log_probs=st.booleans(),
    cancelled_after=st.none() | st.integers(0, 12),
)


@settings(deadline=None, max_examples=75)
@given(
    life=st.lists(arrivals, min_size=1, max_size=12),
    capacity=st.integers(36, 120),
    max_running=st.integers(1, 6),
    batch_max_tokens=st.integers(1, 30),
    depth=st.integers(0, 2),
    policy=st.sampled_from([ExactAdmission, PastFutureAdmission, RecklessAdmission]),
    prefix_cache=st.booleans(),
)
def test_random_lives(
    life: list[Arrival], capacity: int, max_running: int, batch_max_tokens: int, depth: int,
    policy: Callable[[], AdmissionPolicy], prefix_cache: bool,
) -> None:  # fmt: skip
    router = Router(
        capacity, max_running, batch_max_tokens, max_queue_size=100, eos_ids=EOS_IDS, policy=policy(),
        prefix_cache=prefix_cache,
    )  # fmt: skip
    loop = EngineLoop(router, FakeRunner(capacity, max_running), depth)
    requests = {f"r{index}": arrival.request(f"r{index}") for index, arrival in enumerate(life)}
    for step in range(40):
        for uid, arrival in zip(requests, life, strict=True):
            if arrival.step == step:
                submit(router, requests[uid])
            if arrival.cancelled_after is not None and arrival.step + arrival.cancelled_after == step:
                router.cancel(uid)
        loop.step()
    loop.run()
    for uid, arrival in zip(requests, life, strict=True):
        tokens, reason = loop.answer(uid)
        expected_tokens, expected_reason = expected_answer(requests[uid], EOS_IDS)
        if reason is FinishReason.CANCELLED:
            assert arrival.cancelled_after is not None
            assert tokens == expected_tokens[: len(tokens)]
        else:
            assert (tokens, reason) == (expected_tokens, expected_reason)
        assert loop.chunks[uid][-1].num_prompt_tokens == arrival.prompt_length
        log_probs = [value for chunk in loop.chunks[uid] for value in chunk.log_probs]
        assert log_probs == [-token - 0.5 for token in tokens if arrival.return_log_probs]
    assert all(batch.lengths[batch.num_decodes :].sum() <= batch_max_tokens for batch in loop.batches)
    assert all(len(batch.rows) <= max_running for batch in loop.batches)
    stats = router.stats()
    assert (stats.queued_requests, stats.running_requests, stats.kv_tokens_used) == (0, 0, 0)
    assert sum(router.ended_requests.values()) == len(life)


@settings(deadline=None, max_examples=60)
@given(
    mix=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 15)), min_size=1, max_size=8),
    depth=st.integers(0, 1),
    groups=st.sampled_from([ONE_GROUP, LayerGroups(0, 1, 8), LayerGroups(1, 2, 5)]),
)
def test_the_pool_is_filled_to_the_last_slot(mix: list[tuple[int, int]], depth: int, groups: LayerGroups) -> None:
    prompts, answers = np.array(mix, dtype=np.int64).T
    if groups.num_windowed:
        # In the first step, prompts have all their slots.
        forecast = WindowedForecast(groups, 1000, prompts, answers - 1).peak
        peak = max(groups.count * int(prompts.sum()), forecast)
        capacity = max(peak, *(groups.most_held(length, 1000) for length in (prompts + answers - 1).tolist()))
    else:
        peak = capacity = Forecast(prompts, answers - 1).peak
    router = Router(
        capacity, len(mix), batch_max_tokens=1000, max_queue_size=100, eos_ids=EOS_IDS,
        prefix_cache=groups.num_windowed == 0, groups=groups,
    )  # fmt: skip
    loop = EngineLoop(router, FakeRunner(capacity, len(mix), groups=groups), depth)
    for index, (prompt_length, max_tokens) in enumerate(mix):
        submit(router, make_request(f"r{index}", prompt_length, max_tokens, ignore_eos=True))
    loop.run()
    assert len(loop.batches[0].admitted) == len(mix)
    assert len(loop.batches) == answers.max()
    assert loop.most_used == -(-peak // groups.count)
