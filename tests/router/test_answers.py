# SPDX-License-Identifier: Apache-2.0
"""Several answers to one prompt: its tokens are computed once and take their slots once, with the cache and without."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.request import FinishReason, RequestError
from lightllm_backend.router.router import Router
from tests.router.fake_engine import EngineLoop, FakeRunner, expected_answer, make_request
from tests.router.test_preemption import RecklessAdmission

both_caches = pytest.mark.parametrize("prefix_cache", [False, True])


def make_loop(capacity: int = 200, max_running: int = 16, batch_max_tokens: int = 64, depth: int = 1, **more):
    router = Router(capacity, max_running, batch_max_tokens, max_queue_size=4, eos_ids=frozenset({4}), **more)
    return EngineLoop(router, FakeRunner(capacity, max_running), depth)


def assert_answered(loop: EngineLoop, request) -> None:
    for one in request.copies():
        assert loop.answer(one.uid) == expected_answer(one, frozenset({4}))
    stats = loop.router.stats()
    assert (stats.queued_requests, stats.running_requests, stats.kv_tokens_used) == (0, 0, 0)
    assert not loop.router._num_answers


@both_caches
def test_the_prompt_is_computed_once(prefix_cache: bool) -> None:
    loop = make_loop(prefix_cache=prefix_cache)
    request = make_request("a", 30, max_tokens=5, n=4, ignore_eos=True)
    loop.submit(request)
    loop.step()
    assert loop.batches[0].lengths.tolist() == [30, 1, 1, 1]
    assert [one.sampling.seed for one in loop.batches[0].admitted] == [0, 1, 2, 3]
    loop.run()
    assert_answered(loop, request)
    assert loop.router.stats().prompt_tokens_total == 33
    # What was shared is kept by the cache alone.
    assert (loop.router.stats().kv_tokens_cached > 0) == prefix_cache


@both_caches
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 1), st.booleans(), st.integers(1, 40))
def test_the_peak_is_foreseen_reached_and_never_exceeded(
    prefix_cache: bool, prompt: int, max_tokens: int, n: int, depth: int, is_tight: bool, batch_max_tokens: int
) -> None:
    """All but the prompt's last token is shared. In a pool of one slot less they cannot all run at once."""
    peak = prompt - 1 + n * max_tokens
    capacity = max(peak - is_tight, prompt + max_tokens - 1)
    at_once = batch_max_tokens >= prompt + n - 1
    loop = make_loop(capacity, 16, batch_max_tokens, depth, prefix_cache=prefix_cache)
    request = make_request("a", prompt, max_tokens, n=n, ignore_eos=True)
    loop.submit(request)
    loop.run()
    assert_answered(loop, request)
    if at_once and capacity == peak:
        assert len(loop.batches[0].rows) == n
        assert loop.most_used == peak
    if at_once and capacity < peak:
        assert len(loop.batches[0].rows) < n


@both_caches
def test_those_that_do_not_fit_follow_in_front_of_others(prefix_cache: bool) -> None:
    loop = make_loop(capacity=40, prefix_cache=prefix_cache)
    request, other = make_request("a", 20, max_tokens=8, n=4), make_request("b", 5, max_tokens=2)
    loop.submit(request)
    loop.submit(other)
    loop.run()
    order = [(one.prompt_ids == other.prompt_ids) for batch in loop.batches for one in batch.admitted]
    assert order == [False, False, False, False, True]
    assert loop.answer("b") == expected_answer(other, frozenset({4}))
    assert_answered(loop, request)
    assert loop.router.stats().prompt_tokens_total == 20 + 3 + 5


@both_caches
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_all_end_when_the_request_ends(prefix_cache: bool, steps: int) -> None:
    """While they wait outside the queue, in front of it, and run."""
    now = [0.0]
    loop = make_loop(30, 2, 8, prefix_cache=prefix_cache, clock=lambda: now[0])
    loop.submit(make_request("a", 12, max_tokens=9, n=4, deadline=5.0))
    for _ in range(steps):
        loop.step()
    now[0] = 6.0
    loop.run()
    for uid in ("a", "a/1", "a/2", "a/3"):
        last = loop.chunks[uid][-1]
        assert last.finish_reason is FinishReason.CANCELLED
        assert "deadline" in str(last.error)
    assert loop.router.ended_requests["cancelled"] == 4
    assert not loop.router._num_answers
    assert loop.router._pool.available == 30


def test_a_request_counts_once_in_the_queue_until_it_runs() -> None:
    loop = make_loop(capacity=30, max_running=1)
    loop.submit(make_request("run", 10, max_tokens=9))
    loop.step()
    for uid in "abcd":
        loop.submit(make_request(uid, 10, max_tokens=9, n=4))
    with pytest.raises(RequestError, match="the queue is full"):
        loop.submit(make_request("e", 10))
    loop.run()
    assert sum(loop.router.ended_requests.values()) == 1 + 4 * 4 + 1


@both_caches
def test_preempted_answers_share_again(prefix_cache: bool) -> None:
    loop = make_loop(capacity=34, policy=RecklessAdmission(), prefix_cache=prefix_cache)
    request = make_request("a", 10, max_tokens=12, n=4, ignore_eos=True)
    loop.submit(request)
    loop.run()
    assert loop.router.stats().preemptions_total > 0
    assert_answered(loop, request)


def test_a_second_holder_needs_no_room_for_what_it_shares() -> None:
    """Other requests that begin alike gain from the same count."""
    loop = make_loop(capacity=29)
    requests = [make_request(uid, 20, max_tokens=5, family=1, ignore_eos=True) for uid in "ab"]
    for request in requests:
        loop.submit(request)
    loop.step()
    assert len(loop.batches[0].rows) == 2
    loop.run()
    assert loop.most_used == 29
