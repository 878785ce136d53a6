# SPDX-License-Identifier: Apache-2.0
"""Tenants share the engine by what they receive, a single request passes a flood, and nobody starves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.request import FinishReason, RequestError
from lightllm_backend.router.batch import StepResult
from lightllm_backend.router.fair_queue import MAX_IDLE_TENANTS, PRIORITY_SECONDS, FairQueue
from lightllm_backend.router.router import Router
from lightllm_backend.router.sequence import Sequence
from lightllm_backend.worker.main import build_router
from tests.router.fake_engine import EngineLoop, FakeRunner, expected_answer, make_request, submit
from tests.router.test_preemption import RecklessAdmission

both_depths = pytest.mark.parametrize("depth", [0, 1])


def make_loop(depth: int, capacity: int = 64, max_running: int = 16, batch_max_tokens: int = 32, **more) -> EngineLoop:
    settings_ = {"max_queue_size": 1000, "eos_ids": frozenset()} | more
    return EngineLoop(
        Router(capacity, max_running, batch_max_tokens, **settings_), FakeRunner(capacity, max_running), depth
    )


class Flood:
    """Keeps requests of one tenant waiting, whatever is admitted."""

    def __init__(self, loop: EngineLoop, tenant: str, prompt_length: int, max_tokens: int, waiting: int = 4) -> None:
        self._loop, self._tenant, self._waiting = loop, tenant, waiting
        self._lengths = prompt_length, max_tokens
        self._numbers = itertools.count()

    def refill(self) -> None:
        queued = sum(sequence.request.tenant == self._tenant for sequence in self._loop.router._queue)
        for _ in range(self._waiting - queued):
            uid = f"{self._tenant}{next(self._numbers)}"
            self._loop.submit(make_request(uid, *self._lengths, tenant=self._tenant, ignore_eos=True))


def computed(loop: EngineLoop) -> Counter[str]:
    """Tokens that the batches so far have computed, by the first letter of the uid."""
    received: Counter[str] = Counter()
    for uid, chunks in loop.chunks.items():
        received[uid[0]] += chunks[0].num_prompt_tokens + sum(len(chunk.token_ids) for chunk in chunks) - 1
    return received


@both_depths
@pytest.mark.parametrize("weights", [{}, {"a": 3.0}, {"b": 2.0}])
def test_tenants_that_always_wait_share_by_weight(depth: int, weights: Mapping[str, float]) -> None:
    """By tokens, though the answers of one are four times as long, and twice as many of its requests wait."""
    loop = make_loop(depth, tenant_weights=weights, prefix_cache=False)
    floods = [Flood(loop, "a", prompt_length=3, max_tokens=20, waiting=20), Flood(loop, "b", 6, 3, waiting=10)]
    for _ in range(600):
        for flood in floods:
            flood.refill()
        loop.step()
    received = computed(loop)
    expected = weights.get("a", 1.0) / weights.get("b", 1.0)
    assert received["a"] / received["b"] == pytest.approx(expected, rel=0.1)


@both_depths
def test_a_single_request_passes_a_flood(depth: int) -> None:
    loop = make_loop(depth)
    for index in range(100):
        loop.submit(make_request(f"a{index}", 8, 9, tenant="a"))
    for _ in range(12):
        loop.step()
    loop.submit(make_request("b", 8, 9, tenant="b"))
    seen = len(loop.batches)
    while not loop.chunks["b"]:
        loop.step()
    admitted = [entry.prompt_ids for batch in loop.batches[seen:] for entry in batch.admitted]
    assert admitted.index(make_request("b", 8).prompt_ids) == 0
    loop.run()
    assert loop.answer("b") == expected_answer(make_request("b", 8, 9), frozenset())


def test_the_wait_of_a_single_request_for_a_full_pool_and_the_reserve_that_spares_it() -> None:
    waits = {}
    for reserve in (0.0, 0.25):
        loop = make_loop(depth=1, capacity=460, max_running=8, tenant_reserve=reserve, prefix_cache=False)
        for index in range(100):
            loop.submit(make_request(f"a{index}", 8, 50, tenant="a", ignore_eos=True))
        for _ in range(5):
            loop.step()
        loop.submit(make_request("b", 8, 5, tenant="b"))
        started = len(loop.batches)
        while not loop.chunks["b"]:
            loop.step()
        waits[reserve] = len(loop.batches) - started
    # All eight rows are taken until step 50. The reserve leaves two rows: planned at once, seen a step later.
    assert waits == {0.0: 47, 0.25: 2}


def test_the_reserve_is_for_the_first_request_of_each_tenant() -> None:
    router = Router(100, 8, 100, 100, frozenset(), tenant_reserve=0.5)
    for uid, tenant in [("a0", "a"), ("a1", "a"), ("b0", "b"), ("b1", "b"), ("c0", "c")]:
        submit(router, make_request(uid, 11, 10, tenant=tenant))
    batch = router.next_batch()
    assert batch is not None
    # Each takes 20 slots. Of 50, "a" takes 40; "b" and "c" begin in the reserve, and nobody's second fits there.
    assert len(batch.admitted) == 3
    assert router.stats().queued_requests == 2
    router.check_integrity()


def test_a_lone_tenant_s_large_request_does_not_wait_for_the_reserve_for_ever() -> None:
    loop = make_loop(depth=0, capacity=64, tenant_reserve=0.5)
    loop.submit(make_request("small", 4, 4, tenant="a"))
    loop.submit(make_request("large", 50, 15, tenant="a"))
    loop.run()
    assert loop.answer("large") == expected_answer(make_request("large", 50, 15), frozenset())


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    loop = make_loop(depth=0, prefix_cache=False)
    a, b = Flood(loop, "a", 4, 8), Flood(loop, "b", 4, 8)
    b.refill()
    for _ in range(300):
        a.refill()
        loop.step()
    before = computed(loop)
    assert before["a"] > 20 * before["b"]
    for _ in range(60):
        a.refill()
        b.refill()
        loop.step()
    gained = computed(loop) - before
    assert gained["a"] / gained["b"] == pytest.approx(1.0, abs=0.25)


def test_new_tenants_without_end_do_not_starve_one_that_has_received_more() -> None:
    loop = make_loop(depth=0, max_running=2, prefix_cache=False)
    loop.submit(make_request("z", 4, 1, tenant="other"))
    for index in range(3):
        loop.submit(make_request(f"t{index}", 20, 5, tenant="t", ignore_eos=True))
    numbers = itertools.count()
    for _ in range(400):
        while loop.router.stats().queued_requests < 6:
            number = next(numbers)
            loop.submit(make_request(f"n{number}", 3, 2, tenant=f"new {number}"))
        loop.step()
    assert loop.answer("t2")[1] is FinishReason.LENGTH


# Priority


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission_order(router: Router) -> list[int]:
    """Prompt lengths in the order of admission."""
    order = []
    while router.has_queue:
        batch = router.next_batch()
        assert batch is not None
        order += [len(entry.prompt_ids) for entry in batch.admitted]
        tokens = int(batch.samples.sum())
        router.apply(batch, sampled(tokens))
    return order


def sampled(count: int) -> StepResult:
    return StepResult(np.full(count, 1, dtype=np.int32))


def test_priority_orders_the_requests_of_a_tenant_and_only_those() -> None:
    router = Router(100, 1, 100, 100, frozenset(), clock=Clock())
    for length, tenant, priority in [(2, "a", 0), (3, "a", 5), (4, "a", -5), (5, "a", 0), (6, "b", 9), (7, "b", 0)]:
        submit(router, make_request(f"r{length}", length, 1, tenant=tenant, priority=priority))
    order = admission_order(router)
    assert [length for length in order if length < 6] == [4, 2, 5, 3]
    assert [length for length in order if length >= 6] == [7, 6]
    assert order.index(7) < 2, "what tenants say of their own requests is nothing to others"


def test_an_unimportant_request_is_passed_only_for_so_long() -> None:
    clock = Clock()
    router = Router(100, 1, 100, 100, frozenset(), clock=clock)
    submit(router, make_request("late", 3, 1, priority=2))
    admitted_after = None
    for second in range(200):
        for copy in range(2):
            submit(router, make_request(f"r{second}.{copy}", 2, 1, priority=-1))
        batch = router.next_batch()
        assert batch is not None
        if len(batch.admitted[0].prompt_ids) == 3:
            admitted_after = second
            break
        router.apply(batch, sampled(1))
        clock.now += 1.0
    # Three levels are worth 30 s of arrivals; two come while one is served.
    assert admitted_after == 2 * 3 * PRIORITY_SECONDS


# A full queue


def test_a_full_queue_takes_a_small_tenant_s_request_for_the_newest_of_the_largest() -> None:
    router = Router(100, 1, 100, 6, frozenset())
    for index in range(6):
        submit(router, make_request(f"a{index}", 3, tenant="a", priority=-1 if index == 5 else 0))
    with pytest.raises(RequestError, match=r"^UNAVAILABLE: the queue is full \(6 requests\)$"):
        submit(router, make_request("a6", 3, tenant="a"))
    for index in range(3):
        submit(router, make_request(f"b{index}", 3, tenant="b"))
        router.check_integrity()
    with pytest.raises(RequestError, match="the queue is full"):
        submit(router, make_request("b3", 3, tenant="b"))
    submit(router, make_request("c0", 3, tenant="c"))
    chunks = router.drain_finished()
    assert [(chunk.uid, chunk.finish_reason) for chunk in chunks] == [
        (uid, FinishReason.REJECTED) for uid in ("a4", "a3", "a2", "a1")
    ]
    assert {str(chunk.error) for chunk in chunks} == {"UNAVAILABLE: the queue is full (6 requests)"}
    assert router.stats().queued_requests == 6


def test_a_heavier_tenant_has_more_places_in_a_full_queue() -> None:
    router = Router(100, 1, 100, 8, frozenset(), tenant_weights={"b": 3.0})
    for tenant, count in [("a", 8), ("b", 20)]:
        for index in range(count):
            try:
                submit(router, make_request(f"{tenant}{index}", 3, tenant=tenant))
            except RequestError:
                break
    left = Counter(sequence.request.tenant for sequence in router._queue)
    assert left == {"a": 2, "b": 6}


# Preemption


@both_depths
def test_the_tenant_that_has_received_most_gives_way(depth: int) -> None:
    loop = make_loop(depth, capacity=40, policy=RecklessAdmission(), prefix_cache=False)
    for index in range(3):
        loop.submit(make_request(f"a{index}", 6, 12, tenant="a"))
    loop.step()
    loop.submit(make_request("b", 6, 12, tenant="b"))
    loop.run()
    assert loop.router.stats().preemptions_total > 0
    again = Counter(entry.prompt_ids for batch in loop.batches for entry in batch.admitted)
    assert again[make_request("b", 6).prompt_ids] == 1, "the newest request is not preempted"
    for uid in ("a0", "a1", "a2", "b"):
        assert loop.answer(uid) == expected_answer(make_request(uid, 6, 12), frozenset())


# Nobody starves


def make_sequence(uid: str, tenant: str, index: int, priority: int = 0) -> Sequence:
    request = make_request(uid, 5, 5, tenant=tenant, priority=priority)
    return Sequence(request, handle=0, arrival_index=index, arrival_time=0.0, quantiles=np.zeros(1))


MOST_PROMPT, MOST_OUTPUT, MOST_WAITING = 12, 2, 6


@settings(deadline=None, max_examples=60)
@given(
    received=st.integers(0, 20),
    ahead=st.integers(0, 3),
    others=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, MOST_PROMPT), st.integers(0, MOST_OUTPUT)), min_size=1, max_size=30
    ),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    new_names=st.booleans(),
)
def test_every_request_has_its_turn_after_a_bounded_service_to_others(
    received: int, ahead: int, others: list[tuple[int, int, int]], weight: float, new_names: bool
) -> None:
    """Whatever others ask for without end, and even if each of their requests is a new tenant's.

    Each token that a waiting tenant receives raises the floor by 1 / (weight of all that wait); the floor has to rise
    by what the tenant itself has received. In the worst case only prompts count, the shortest of one token.
    """
    queue, numbers = FairQueue({"t": weight}), itertools.count()

    def add(tenant: str) -> Sequence:
        number = next(numbers)
        queue.add(sequence := make_sequence(f"r{number}", tenant, number))
        return sequence

    def serve(sequence: Sequence, prompt: int, output: int) -> None:
        queue.start(sequence, prompt)
        for _ in range(output):
            queue.charge_decodes(None)
        queue.end(sequence)

    add("other 0")
    serve(add("t"), 1 + received, 0)
    own = [add("t") for _ in range(ahead + 1)]
    to_own, to_others = 1 + received, 0
    for turn in itertools.count():
        tenant, prompt, output = others[turn % len(others)]
        while len(queue) < len(own) + MOST_WAITING:
            add(f"new {next(numbers)}" if new_names else f"other {tenant}")
        sequence = queue.next()
        assert sequence is not None
        if sequence is own[-1]:
            break
        serve(sequence, prompt, output)
        if sequence in own:
            to_own += prompt + output
        else:
            to_others += prompt + output
        most_weight = weight + MOST_WAITING + len(own)
        assert to_others <= (1 + MOST_OUTPUT) * most_weight * (to_own / weight + MOST_PROMPT), "somebody starves"
    queue.check()


def test_tenants_that_are_gone_are_forgotten() -> None:
    queue = FairQueue()
    for index in range(50 * MAX_IDLE_TENANTS):
        queue.add(sequence := make_sequence("r", f"tenant {index}", index))
        queue.start(sequence, 3)
        queue.charge_decodes(None)
        queue.end(sequence)
        assert queue.next() is None
    assert len(queue._tenants) <= 2 * MAX_IDLE_TENANTS
    assert len(queue._line) <= 1


# What the settings do


def test_the_settings_of_tenants_reach_the_router() -> None:
    config = EngineConfig(
        running_max_req_size=8, max_queue_size=8, tenant_weights=(("b", 3.0),), tenant_reserve=0.5, prefix_cache=False
    )
    info = EngineInfo("", "", "cpu", 100, (), LengthLimits(99, "", 100, ""), 1000, {})
    router = build_router(config, info, batch_max_tokens=100)
    for index in range(8):
        submit(router, make_request(f"a{index}", 3, tenant="a"))
    batch = router.next_batch()
    assert batch is not None
    assert len(batch.admitted) == 4, "half of the rows are kept"
    for tenant, count in [("a", 4), ("b", 6)]:
        for index in range(count):
            submit(router, make_request(f"{tenant}+{index}", 3, tenant=tenant))
    with pytest.raises(RequestError, match="the queue is full"):
        submit(router, make_request("b+6", 3, tenant="b"))
