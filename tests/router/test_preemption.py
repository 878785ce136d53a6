# SPDX-License-Identifier: Apache-2.0
"""Sequences that are preempted because the pool is too small for what was let in."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lightllm_backend.request import FinishReason, RequestError
from lightllm_backend.router.admission import Demand
from lightllm_backend.router.router import Router
from tests.router.fake_engine import (
    EngineLoop,
    FakeRunner,
    as_chunks,
    expected_answer,
    make_request,
    next_token,
    submit,
)

both_depths = pytest.mark.parametrize("depth", [0, 1])


class RecklessAdmission:
    """Expects everybody to end at once."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def draw_quantiles(self) -> NDArray[np.float64]:
        return np.zeros(1)

    def steps_left(self, demand: Demand) -> NDArray[np.int64]:
        return np.zeros((1, len(demand.held)), dtype=np.int64)

    def usable(self, capacity: int) -> int:
        return capacity

    def record_length(self, length: int) -> None:
        self.lengths.append(length)


def make_loop(depth: int, capacity: int, max_running: int = 8, batch_max_tokens: int = 32, **settings) -> EngineLoop:
    defaults = {"max_queue_size": 100, "eos_ids": frozenset(), "policy": RecklessAdmission(), "prefix_cache": False}
    settings = defaults | settings
    router = Router(capacity, max_running, batch_max_tokens, **settings)
    return EngineLoop(router, FakeRunner(capacity, max_running), depth)


@both_depths
def test_the_newest_gives_way_and_goes_on_where_it_was(depth: int) -> None:
    loop = make_loop(depth, capacity=20)
    first, second = make_request("a", 6, max_tokens=10), make_request("b", 6, max_tokens=10, return_log_probs=True)
    loop.submit(first)
    loop.submit(second)
    loop.run()
    # 12 slots, then two a step: full after four steps, so "b" gives its 10 back. "a" ends with 15.
    assert loop.router.stats().preemptions_total == 1
    resumed = next(batch for batch in loop.batches[1:] if batch.admitted)
    tokens, _ = expected_answer(second, frozenset())
    assert resumed.admitted[0].prompt_ids == second.prompt_ids
    assert list(resumed.admitted[0].generated_ids) == tokens[:5]
    assert resumed.lengths.tolist()[-1] == 6 + 5
    for request in (first, second):
        assert loop.answer(request.uid) == expected_answer(request, frozenset())
    log_probs = [value for chunk in loop.chunks["b"] for value in chunk.log_probs]
    assert log_probs == [-token - 0.5 for token in tokens]
    assert [chunk.queue_seconds is None for chunk in loop.chunks["b"]] == [False] + [True] * 9


@both_depths
def test_a_prompt_that_is_cut_gives_way_first(depth: int) -> None:
    loop = make_loop(depth, capacity=30, batch_max_tokens=4)
    requests = [make_request("a", 4, max_tokens=20), make_request("b", 4, max_tokens=20), make_request("c", 18)]
    for request in requests:
        loop.submit(request)
    preempted_at = None
    for step in range(200):
        loop.step()
        if loop.router.stats().preemptions_total and preempted_at is None:
            preempted_at = step
            assert loop.router.stats().running_requests == 2
    assert preempted_at is not None
    for request in requests:
        assert loop.answer(request.uid) == expected_answer(request, frozenset())


def test_a_preempted_sequence_is_in_front_of_those_that_wait() -> None:
    loop = make_loop(depth=0, capacity=20, max_running=2)
    for uid in ("a", "b", "c"):
        loop.submit(make_request(uid, 6, max_tokens=10))
    loop.run()
    order = [admission.prompt_ids for batch in loop.batches for admission in batch.admitted]
    assert order == [make_request(uid, 6).prompt_ids for uid in ("a", "b", "b", "c", "c")]


@both_depths
@pytest.mark.parametrize("end", ["cancel", "stop", "deadline"])
def test_a_preempted_sequence_may_end(depth: int, end: str) -> None:
    now = [100.0]
    loop = make_loop(depth, capacity=20, clock=lambda: now[0], queue_timeout_s=3)
    first, second = make_request("a", 6, max_tokens=10), make_request("b", 6, max_tokens=10, deadline=150.0)
    loop.submit(first)
    loop.submit(second)
    while not loop.router.stats().preemptions_total:
        loop.step()
    now[0] += 10.0  # the queue's timeout is for those that have not begun
    loop.step()
    assert loop.chunks["b"][-1].finish_reason is None
    assert loop.router.stats().queued_requests == 1
    if end == "deadline":
        now[0] = 150.0
    else:
        getattr(loop.router, end)("b")
    loop.run()
    expected = {"cancel": FinishReason.CANCELLED, "stop": FinishReason.STOP, "deadline": FinishReason.CANCELLED}
    tokens, reason = loop.answer("b")
    assert (tokens, reason) == (expected_answer(second, frozenset())[0][:5], expected[end])
    assert loop.answer("a") == expected_answer(first, frozenset())
    assert loop.router.stats().kv_tokens_used == 0


def test_an_eos_of_a_step_in_flight_ends_a_preempted_sequence() -> None:
    first, second = make_request("a", 6, max_tokens=10), make_request("b", 6, max_tokens=10)
    tokens, _ = expected_answer(second, frozenset())
    eos = tokens[4]
    assert eos not in tokens[:4]
    loop = make_loop(depth=1, capacity=20, eos_ids=frozenset({eos}))
    loop.submit(make_request("a", 6, max_tokens=10, ignore_eos=True))
    loop.submit(second)
    loop.run()
    assert loop.router.stats().preemptions_total == 1
    assert loop.answer("b") == (tokens[:5], FinishReason.STOP)
    assert sum(len(batch.admitted) for batch in loop.batches) == 2, "it does not come back"
    assert loop.answer("a") == expected_answer(first, frozenset())


def test_tokens_that_are_late_are_waited_for() -> None:
    router = Router(14, 4, 32, max_queue_size=9, eos_ids=frozenset(), policy=RecklessAdmission())
    runner = FakeRunner(14, 4)
    for uid in ("a", "b"):
        submit(router, make_request(uid, 5, max_tokens=9))
    planned = []
    while not router.stats().preemptions_total:
        batch = router.next_batch()
        assert batch is not None
        planned.append((batch, runner.step(batch)))
    router.cancel("a")
    assert router.next_batch() is None, "b's tokens are not known yet"
    chunks = [chunk for batch, result in planned for chunk in as_chunks(router.apply(batch, result))]
    resumed = router.next_batch()
    assert resumed is not None
    answer = [token for chunk in chunks if chunk.uid == "b" for token in chunk.token_ids]
    assert list(resumed.admitted[0].generated_ids) == answer
    assert answer[-1] == next_token([*make_request("b", 5).prompt_ids, *answer[:-1]])


def test_what_can_never_fit_alone_is_refused_all_the_same() -> None:
    loop = make_loop(depth=0, capacity=20)
    with pytest.raises(RequestError, match="the KV pool has 20"):
        loop.submit(make_request("never", 15, max_tokens=7))
    request = make_request("alone", 15, max_tokens=6)
    loop.submit(request)
    loop.run()
    assert loop.answer("alone") == expected_answer(request, frozenset())
    assert loop.router.stats().preemptions_total == 0


@both_depths
def test_lengths_of_answers_that_were_free_to_end_are_learnt(depth: int) -> None:
    policy = RecklessAdmission()
    requests = [make_request(f"r{index}", 3 + index, max_tokens=4 + 3 * index) for index in range(6)]
    loop = make_loop(depth, capacity=40, eos_ids=frozenset({4, 9}), policy=policy)
    for request in requests:
        loop.submit(request)
    loop.submit(make_request("bound", 3, max_tokens=5, ignore_eos=True))
    loop.submit(make_request("cut", 3, max_tokens=5))
    loop.router.cancel("cut")
    loop.run()
    answers = [expected_answer(request, frozenset({4, 9}))[0] for request in requests]
    assert sorted(policy.lengths) == sorted(len(answer) for answer in answers)
