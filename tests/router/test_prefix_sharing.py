# SPDX-License-Identifier: Apache-2.0
"""The Router with its prefix cache: beginnings that are known are not computed again, and the answers stay the same."""

from __future__ import annotations

import gc

import pytest

from lightllm_backend.request import FinishReason, Request, RequestError, SamplingParams
from lightllm_backend.router.router import Router
from tests.router.fake_engine import EngineLoop, FakeRunner, expected_answer, make_request
from tests.router.test_preemption import RecklessAdmission

both_depths = pytest.mark.parametrize("depth", [0, 1])


def make_loop(depth: int, capacity: int = 200, max_running: int = 8, batch_max_tokens: int = 64, **more) -> EngineLoop:
    router = Router(capacity, max_running, batch_max_tokens, max_queue_size=99, eos_ids=frozenset(), **more)
    return EngineLoop(router, FakeRunner(capacity, max_running), depth)


def computed(loop: EngineLoop) -> list[int]:
    """Prompt tokens by step, where there are any."""
    counts = [int(batch.lengths[batch.num_decodes :].sum()) for batch in loop.batches]
    return [count for count in counts if count]


def assert_answered(loop: EngineLoop, *requests: Request) -> None:
    for request in requests:
        assert loop.answer(request.uid) == expected_answer(request, frozenset())


@both_depths
def test_a_prompt_that_is_known_is_not_computed_again(depth: int) -> None:
    loop = make_loop(depth)
    first, second = make_request("a", 20, family=1), make_request("b", 20, family=1)
    longer, other = make_request("c", 25, family=1), make_request("d", 20, family=2)
    for request in (first, second, longer, other):
        loop.submit(request)
        loop.run()
    # At least the last token of a prompt must be computed, since the next one is sampled behind it.
    assert computed(loop) == [20, 1, 5, 20]
    assert loop.router.stats().prompt_tokens_total == 46
    told = [[chunk.num_cached_tokens for chunk in loop.chunks[uid]][:2] for uid in "abcd"]
    assert told == [[0, 0], [19, 0], [20, 0], [0, 0]], "in the first chunk alone"
    assert_answered(loop, first, second, longer, other)


@both_depths
def test_prompts_that_come_together_are_computed_once(depth: int) -> None:
    loop = make_loop(depth)
    requests = [make_request(uid, 30 + index, family=1) for index, uid in enumerate("abcd")]
    for request in requests:
        loop.submit(request)
    loop.step()
    assert loop.batches[0].lengths.tolist() == [30, 1, 1, 1]
    assert loop.router.stats().kv_tokens_used == 33
    loop.run()
    assert_answered(loop, *requests)


@both_depths
def test_an_answer_is_known_to_what_follows(depth: int) -> None:
    loop = make_loop(depth)
    first = make_request("a", 20, max_tokens=9)
    loop.submit(first)
    loop.run()
    answer, _ = expected_answer(first, frozenset())
    follow_up = Request("b", (*first.prompt_ids, *answer, 3, 1), SamplingParams(max_tokens=3))
    loop.submit(follow_up)
    loop.run()
    # All but its last token, which was never fed back, and the two that are new.
    assert computed(loop) == [20, 3]
    assert_answered(loop, first, follow_up)


@both_depths
def test_cached_slots_are_told_apart_and_serve_whoever_needs_them(depth: int) -> None:
    loop = make_loop(depth, capacity=40)
    for uid in ("a", "b", "c"):
        loop.submit(make_request(uid, 10, max_tokens=4))
    loop.run()
    stats = loop.router.stats()
    assert (stats.kv_tokens_used, stats.kv_tokens_cached, stats.kv_tokens_total) == (0, 39, 40)
    large = make_request("large", 30, max_tokens=11)
    loop.submit(large)
    loop.run()
    assert_answered(loop, large)
    assert loop.router.stats().kv_tokens_cached == 40


def test_the_oldest_gives_way_and_what_runs_does_not() -> None:
    loop = make_loop(depth=0, capacity=60)
    for uid in ("a", "b"):
        loop.submit(make_request(uid, 20, max_tokens=1))
        loop.run()
    running = make_request("c", 21, max_tokens=20, family=sum(b"b"))
    loop.submit(running)
    loop.step()
    loop.submit(make_request("d", 15, max_tokens=1))
    loop.run()
    assert_answered(loop, running)
    assert computed(loop)[2] == 1, "b's prompt was still there"
    loop.submit(make_request("again", 20, max_tokens=1, family=sum(b"a")))
    loop.run()
    assert computed(loop)[-1] > 1, "a's is not any more"


def test_more_run_at_a_time_where_they_share() -> None:
    """In the pool of two alone, ten that share a long beginning."""
    most = {}
    for prefix_cache in (False, True):
        loop = make_loop(depth=0, capacity=120, max_running=20, prefix_cache=prefix_cache)
        requests = [make_request(f"r{index}", 50, max_tokens=5, family=1) for index in range(10)]
        for request in requests:
            loop.submit(request)
        loop.run()
        assert_answered(loop, *requests)
        most[prefix_cache] = max(len(batch.rows) for batch in loop.batches)
    assert most[False] == 2
    assert most[True] >= 8


def test_what_a_candidate_shares_is_counted_until_its_own_end() -> None:
    loop = make_loop(depth=0, capacity=36)
    short, long = make_request("a", 10, max_tokens=2, family=1), make_request("b", 10, max_tokens=15, family=1)
    other = make_request("c", 5, max_tokens=15)
    for request in (other, short, long):
        loop.submit(request)
    loop.run()
    # "c" ends with 19 slots, and "b" with 24, of which it would share 9 with "a" in the beginning.
    assert len(loop.batches[0].admitted) == 2
    assert_answered(loop, short, long, other)


def test_what_others_share_is_counted() -> None:
    loop = make_loop(depth=0, capacity=40)
    requests = [make_request(uid, 20, max_tokens=6, family=1) for uid in ("a", "b")]
    for request in requests:
        loop.submit(request)
    loop.step()
    other = make_request("c", 10, max_tokens=5)
    loop.submit(other)
    loop.step()
    # 19 that both share and 6 each, so 31; "c" needs 14.
    assert loop.batches[1].admitted == ()
    loop.run()
    assert_answered(loop, *requests, other)


def test_without_the_cache_nothing_is_kept() -> None:
    loop = make_loop(depth=0, prefix_cache=False)
    for uid in ("a", "b"):
        loop.submit(make_request(uid, 20, family=1))
        loop.run()
    assert computed(loop) == [20, 20]
    assert loop.router.stats().kv_tokens_cached == 0


@both_depths
def test_tenants_find_only_what_is_their_own_where_the_setting_says_so(depth: int) -> None:
    for setting, tokens in [("tenant", [20, 20, 1, 20, 1]), (True, [20, 1, 1, 1, 1])]:
        loop = make_loop(depth, prefix_cache=setting)
        requests = [
            make_request(f"r{i}", 20, family=1, tenant=tenant) for i, tenant in enumerate(["", "a", "", "b", "a"])
        ]
        for request in requests:
            loop.submit(request)
            loop.run()
        assert computed(loop) == tokens
        assert_answered(loop, *requests)


def test_tenants_with_caches_apart_share_the_pool_and_leave_nothing_behind() -> None:
    """Also if a tenant's tree is evicted while one of its sequences runs."""
    loop = make_loop(depth=1, capacity=44, prefix_cache="tenant")
    running = make_request("a0", 3, max_tokens=12, tenant="a")
    loop.submit(running)
    loop.step()
    requests = [
        make_request(f"{tenant}{index}", 20, 4, family=1, tenant=tenant) for index in (1, 2) for tenant in "bcd"
    ]
    for request in requests:
        loop.submit(request)
    loop.run()
    assert_answered(loop, running, *requests)
    assert loop.router.stats().kv_tokens_used == 0
    assert len(loop.router._pool._cache._tenant_roots) > 1
    loop.router.fail_all(RequestError("INTERNAL", "the step failed"))
    assert loop.router.stats().kv_tokens_cached == 0
    gc.collect()
    assert len(loop.router._pool._cache._tenant_roots) == 0, "names of tenants pile up"


@both_depths
def test_a_preempted_sequence_finds_what_it_had(depth: int) -> None:
    loop = make_loop(depth, capacity=20, policy=RecklessAdmission())
    first, second = make_request("a", 6, max_tokens=10), make_request("b", 6, max_tokens=10)
    loop.submit(first)
    loop.submit(second)
    while not loop.router.stats().preemptions_total:
        loop.step()
    loop.router.cancel("a")
    loop.run()
    resumed = next(batch for batch in loop.batches[1:] if batch.admitted)
    # What it gave back lay in the cache, and was not needed in the meantime but for the last slot.
    assert len(resumed.admitted[0].cached_slots) >= 8
    assert_answered(loop, second)


def test_a_failed_step_leaves_nothing_in_the_cache() -> None:
    loop = make_loop(depth=0)
    loop.submit(make_request("a", 20))
    loop.run()
    loop.submit(make_request("b", 20))
    loop.router.next_batch()
    loop.router.fail_all(RequestError("INTERNAL", "the step failed"))
    stats = loop.router.stats()
    assert (stats.kv_tokens_used, stats.kv_tokens_cached) == (0, 0)
    loop.router.check_integrity()


@both_depths
def test_a_long_prompt_that_is_cut_is_shared_as_far_as_it_is_planned(depth: int) -> None:
    loop = make_loop(depth, batch_max_tokens=16)
    first = make_request("a", 40, max_tokens=2, family=1)
    loop.submit(first)
    loop.step()
    loop.router.cancel("a")
    second = make_request("b", 40, max_tokens=2, family=1)
    loop.submit(second)
    loop.run()
    assert computed(loop) == [16, 16, 8]
    assert loop.answer("a")[1] is FinishReason.CANCELLED
    assert_answered(loop, second)
