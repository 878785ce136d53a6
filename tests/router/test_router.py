# SPDX-License-Identifier: Apache-2.0
"""The Router's rules one by one, most of them with steps that do and that do not overlap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.router.batch import Batch, Scores, StepResult
from lightllm_backend.router.router import NOT_NUMBERS, Router
from tests.router.fake_engine import EngineLoop, FakeRunner, as_chunks, expected_answer, make_request, submit

EOS = 10
CAPACITY = 64
both_depths = pytest.mark.parametrize("depth", [0, 1])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_router(capacity: int = CAPACITY, max_running: int = 8, batch_max_tokens: int = 32, **settings) -> Router:
    return Router(
        capacity, max_running, batch_max_tokens, **({"max_queue_size": 10, "eos_ids": frozenset()} | settings)
    )


def make_loop(depth: int, **settings) -> EngineLoop:
    router = make_router(**settings)
    return EngineLoop(router, FakeRunner(settings.get("capacity", CAPACITY), settings.get("max_running", 8)), depth)


def sampled(batch, token: int) -> StepResult:
    return StepResult(np.full(int(batch.samples.sum()), token, dtype=np.int32))


def only_chunk(chunks: list[TokenChunk]) -> TokenChunk:
    assert len(chunks) == 1
    return chunks[0]


# Submitting


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    router = make_router()
    submit(router, make_request("fits", prompt_length=60, max_tokens=5))
    message = (
        "INVALID_ARG: the prompt has 60 tokens and max_tokens is 6; that takes 65 token slots, and the KV pool has 64"
    )
    with pytest.raises(RequestError, match=message):
        submit(router, make_request("never", prompt_length=60, max_tokens=6))
    assert router.stats().queued_requests == 1
    assert router.ended_requests["rejected"] == 1


def test_a_full_queue_refuses_until_there_is_room() -> None:
    router = make_router(max_queue_size=2)
    submit(router, make_request("a", 3))
    submit(router, make_request("b", 3))
    with pytest.raises(RequestError, match=r"^UNAVAILABLE: the queue is full \(2 requests\)$"):
        submit(router, make_request("c", 3))
    router.next_batch()
    submit(router, make_request("c", 3))


def test_a_uid_may_be_used_again_only_after_its_end() -> None:
    router = make_router()
    submit(router, make_request("a", 3))
    with pytest.raises(RequestError, match="INVALID_ARG: uid 'a'"):
        submit(router, make_request("a", 5))
    router.cancel("a")
    submit(router, make_request("a", 5))


# Planning


def test_a_batch_spelled_out() -> None:
    router = make_router(batch_max_tokens=5)
    first, second = make_request("a", 3, seed=7), make_request("b", 4)
    submit(router, first)
    submit(router, second)
    batch = router.next_batch()
    assert batch is not None
    assert batch.num_decodes == 0
    assert (batch.rows.tolist(), batch.starts.tolist(), batch.lengths.tolist()) == ([0, 1], [0, 0], [3, 2])
    assert batch.slots.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.samples.tolist() == [True, False]
    assert [(entry.row, entry.prompt_ids, entry.sampling) for entry in batch.admitted] == [
        (0, first.prompt_ids, first.sampling),
        (1, second.prompt_ids, second.sampling),
    ]
    batch = router.next_batch()
    assert batch is not None
    assert batch.num_decodes == 1
    assert (batch.rows.tolist(), batch.starts.tolist(), batch.lengths.tolist()) == ([0, 1], [3, 2], [1, 2])
    assert batch.slots.tolist() == [[5, 6, 7]]
    assert batch.samples.tolist() == [True, True]
    assert batch.admitted == ()


def test_nothing_to_do_is_none() -> None:
    router = make_router()
    assert router.next_batch() is None
    assert not router.has_work


def test_planning_ends_with_max_tokens_however_late_the_tokens_are_known() -> None:
    router = make_router()
    submit(router, make_request("a", 3, max_tokens=3))
    batches = [router.next_batch() for _ in range(5)]
    assert [batch is not None for batch in batches] == [True, True, True, False, False]
    assert router.stats().running_requests == 1
    reasons = [only_chunk(as_chunks(router.apply(batch, sampled(batch, 1)))).finish_reason for batch in batches[:3]]
    assert reasons == [None, None, FinishReason.LENGTH]


def test_admission_is_in_order_of_arrival_and_nobody_overtakes() -> None:
    router = make_router(capacity=30, batch_max_tokens=100)
    submit(router, make_request("a", 10, max_tokens=5))
    submit(router, make_request("large", 20, max_tokens=5))
    submit(router, make_request("small", 1, max_tokens=1))
    batch = router.next_batch()
    assert [len(entry.prompt_ids) for entry in batch.admitted] == [10]
    router.cancel("large")
    assert [len(entry.prompt_ids) for entry in router.next_batch().admitted] == [1]


def test_an_urgent_request_goes_first_and_waits_for_no_queue() -> None:
    router = make_router(max_running=1, max_queue_size=2)
    submit(router, make_request("runs", 3, max_tokens=2))
    router.next_batch()
    for uid in ("a", "b"):
        submit(router, make_request(uid, 3, max_tokens=2))
    for uid in ("p1", "p2"):
        submit(router, replace(make_request(uid, 5, max_tokens=1), urgent=True))
    router.check_integrity()
    with pytest.raises(RequestError, match=r"the queue is full \(4 requests\)"):
        submit(router, make_request("c", 3))
    router.next_batch()
    router.cancel("runs")
    assert [len(entry.prompt_ids) for entry in router.next_batch().admitted] == [5], "a probe"
    assert router.stats().queued_requests == 3
    router.check_integrity()


@pytest.mark.parametrize(("capacity", "admitted_at_once"), [(28, False), (29, True)])
def test_a_prompt_that_is_cut_counts_until_its_late_end(capacity: int, admitted_at_once: bool) -> None:
    """Planned in 5 steps (4 + 5 + 5 + 5 + 1 tokens) and 2 decodes, it holds 20 + 2 slots when the other holds 1 + 6."""
    loop = make_loop(depth=0, capacity=capacity, batch_max_tokens=5)
    loop.submit(make_request("other", 1, max_tokens=7))
    loop.submit(make_request("cut", 20, max_tokens=3))
    loop.step()
    assert (len(loop.batches[0].admitted) == 2) is admitted_at_once
    loop.run()
    assert loop.answer("cut")[1] is FinishReason.LENGTH


@both_depths
def test_a_row_serves_the_next_sequence_at_once(depth: int) -> None:
    loop = make_loop(depth, max_running=1)
    requests = [make_request(f"r{index}", prompt_length=4, max_tokens=3) for index in range(3)]
    for request in requests:
        loop.submit(request)
    loop.run()
    assert len(loop.batches) == 9  # no step without it, also where the last token is not known yet
    for request in requests:
        assert loop.answer(request.uid) == expected_answer(request, frozenset())


@both_depths
def test_a_much_longer_sequence_may_join_those_that_run(depth: int) -> None:
    loop = make_loop(depth, capacity=1500, batch_max_tokens=600)
    requests = [make_request("short", 9, max_tokens=8), make_request("long", 1300, max_tokens=5)]
    for request in requests:
        loop.submit(request)
        loop.step()
    loop.run()
    for request in requests:
        assert loop.answer(request.uid) == expected_answer(request, frozenset())


@both_depths
def test_prefill_and_decode_both_progress_in_every_step(depth: int) -> None:
    loop = make_loop(depth, capacity=400, batch_max_tokens=4)
    for index in range(3):
        loop.submit(make_request(f"short{index}", 1, max_tokens=40))
    loop.step()
    for index in range(4):
        loop.submit(make_request(f"long{index}", 30, max_tokens=2))
    for _ in range(30):
        loop.step()
    for batch in loop.batches[1:31]:
        assert {0, 1, 2} <= set(batch.rows[: batch.num_decodes].tolist())
        assert batch.lengths[batch.num_decodes :].sum() == 4
    loop.run()
    assert [loop.answer(f"long{index}")[1] for index in range(4)] == [FinishReason.LENGTH] * 4


# Ending


@both_depths
def test_eos_ends_with_its_token_and_what_overlaps_is_ignored(depth: int) -> None:
    router = make_router(eos_ids=frozenset({EOS}), max_running=1)
    submit(router, make_request("a", 3, max_tokens=10))
    submit(router, make_request("b", 5, max_tokens=10))
    batches = [router.next_batch() for _ in range(1 + depth)]
    chunk = only_chunk(as_chunks(router.apply(batches[0], sampled(batches[0], EOS))))
    assert (chunk.uid, chunk.token_ids, chunk.finish_reason) == ("a", [EOS], FinishReason.STOP)
    assert router.stats().kv_tokens_used == 0
    batches.append(router.next_batch())  # "b" has the row that the batch in flight knows as that of "a"
    assert [entry.row for entry in batches[-1].admitted] == [0]
    if depth == 1:
        assert as_chunks(router.apply(batches[1], sampled(batches[1], 1))) == []
    chunk = only_chunk(as_chunks(router.apply(batches[-1], sampled(batches[-1], 2))))
    assert (chunk.uid, chunk.token_ids, chunk.finish_reason) == ("b", [2], None)
    assert router.stats().generated_tokens_total == 2


def test_eos_waits_for_min_tokens_and_is_a_token_where_it_is_ignored() -> None:
    router = make_router(eos_ids=frozenset({3, EOS}))
    submit(router, make_request("waits", 2, max_tokens=9, min_tokens=2))
    submit(router, make_request("ignores", 2, max_tokens=4, ignore_eos=True))
    answers: dict[str, list[FinishReason | None]] = {"waits": [], "ignores": []}
    while (batch := router.next_batch()) is not None:
        for chunk in as_chunks(router.apply(batch, sampled(batch, EOS))):
            answers[chunk.uid].append(chunk.finish_reason)
    assert answers["waits"] == [None, None, FinishReason.STOP]
    assert answers["ignores"] == [None, None, None, FinishReason.LENGTH]


def test_stop_token_ids_are_their_own_request_s_and_hold_where_eos_is_ignored() -> None:
    router = make_router(eos_ids=frozenset({3, EOS}))
    stop = 5
    submit(router, make_request("stops", 2, max_tokens=9, stop_token_ids=(1, stop)))
    submit(router, make_request("waits", 2, max_tokens=9, stop_token_ids=(stop,), min_tokens=2, ignore_eos=True))
    submit(router, make_request("other", 2, max_tokens=4, stop_token_ids=(1,)))
    submit(router, make_request("none", 2, max_tokens=4))
    answers: dict[str, list[FinishReason | None]] = {"stops": [], "waits": [], "other": [], "none": []}
    while (batch := router.next_batch()) is not None:
        for chunk in as_chunks(router.apply(batch, sampled(batch, stop))):
            answers[chunk.uid].append(chunk.finish_reason)
    assert answers["stops"] == [FinishReason.STOP]
    assert answers["waits"] == [None, None, FinishReason.STOP]
    assert answers["other"] == answers["none"] == [None, None, None, FinishReason.LENGTH]


@both_depths
def test_a_row_that_changes_hands_keeps_nothing_of_the_stop_token_ids(depth: int) -> None:
    loop = make_loop(depth, max_running=1)
    requests = [make_request("a", 3, max_tokens=6, stop_token_ids=tuple(range(11)))]
    requests += [make_request(uid, 3, max_tokens=6, stop_token_ids=ids) for uid, ids in [("b", ()), ("c", (2, 9))]]
    for request in requests:
        loop.submit(request)
    loop.run()
    assert [loop.answer(request.uid) for request in requests] == [expected_answer(one, frozenset()) for one in requests]
    assert loop.answer("a")[1] is FinishReason.STOP
    assert loop.answer("b")[1] is FinishReason.LENGTH


def test_an_eos_that_is_the_last_token_is_a_stop() -> None:
    router = make_router(eos_ids=frozenset({EOS}))
    submit(router, make_request("a", 3, max_tokens=1))
    batch = router.next_batch()
    assert only_chunk(as_chunks(router.apply(batch, sampled(batch, EOS)))).finish_reason is FinishReason.STOP


@both_depths
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6, 7])
def test_cancel_in_every_state_gives_all_back_and_ends_once(depth: int, steps: int) -> None:
    """Queued, after the first chunk of its prompt, after the last, decoding, with its last step planned, and ended."""
    loop = make_loop(depth, batch_max_tokens=4)
    request, neighbour = make_request("a", 8, max_tokens=5), make_request("n", 2, max_tokens=12)
    loop.submit(request)
    for _ in range(steps):
        loop.step()
    loop.submit(neighbour)
    loop.router.cancel("a")
    loop.router.cancel("a")
    loop.collect(loop.router.drain_finished())
    loop.router.check_integrity()
    assert loop.router.stats().kv_tokens_used == 0
    loop.run()
    tokens, reason = loop.answer("a")
    expected, _ = expected_answer(request, frozenset())
    ended_before = steps - depth >= 6
    assert tokens == expected[: max(0, min(steps - depth - 1, 5))]
    assert reason is (FinishReason.LENGTH if ended_before else FinishReason.CANCELLED)
    assert loop.answer("n") == expected_answer(neighbour, frozenset())


def test_stop_is_a_stop_and_unknown_uids_are_no_error() -> None:
    router = make_router()
    submit(router, make_request("a", 3))
    batch = router.next_batch()
    router.stop("a")
    router.stop("a")
    router.stop("unknown")
    router.cancel("unknown")
    chunk = only_chunk(as_chunks(router.apply(batch, sampled(batch, 1))))
    assert (chunk.token_ids, chunk.finish_reason, chunk.error) == ([], FinishReason.STOP, None)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_deadline_ends_queued_and_running_requests(steps: int) -> None:
    clock = Clock()
    router = make_router(clock=clock)
    submit(router, make_request("a", 3, deadline=clock.now + 5))
    submit(router, make_request("other", 3, deadline=clock.now + 50))
    for _ in range(steps):
        batch = router.next_batch()
        router.apply(batch, sampled(batch, 1))
    clock.now += 5
    assert router.next_batch() is not None
    chunk = only_chunk(router.drain_finished())
    assert (chunk.uid, chunk.finish_reason) == ("a", FinishReason.CANCELLED)
    assert str(chunk.error) == "CANCELLED: the request's deadline has passed"


def test_a_deadline_of_an_ended_request_does_not_end_the_next_of_its_uid() -> None:
    clock = Clock()
    router = make_router(clock=clock)
    submit(router, make_request("a", 3, deadline=clock.now + 5))
    router.cancel("a")
    submit(router, make_request("a", 3, deadline=clock.now + 50))
    clock.now += 10
    router.next_batch()
    assert [chunk.finish_reason for chunk in router.drain_finished()] == [FinishReason.CANCELLED]
    assert router.stats().running_requests == 1


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    router = make_router()
    for index in range(2000):
        submit(router, make_request(f"r{index}", 1, deadline=1e12))
        router.cancel(f"r{index}")
    assert len(router._deadlines) < 100


def test_the_queue_timeout_ends_only_those_that_still_wait() -> None:
    clock = Clock()
    router = make_router(clock=clock, max_running=1, queue_timeout_s=2.5)
    submit(router, make_request("runs", 3, max_tokens=9))
    submit(router, make_request("waits", 3))
    router.next_batch()
    clock.now += 1
    submit(router, make_request("later", 3))
    clock.now += 1.5
    router.next_batch()
    chunk = only_chunk(router.drain_finished())
    assert (chunk.uid, chunk.finish_reason) == ("waits", FinishReason.FAILED)
    assert str(chunk.error) == "UNAVAILABLE: the request waited in the queue for 2.5 seconds"
    assert (router.stats().queued_requests, router.stats().running_requests) == (1, 1)


class SpoiledRunner(FakeRunner):
    """The logits that follow this token are not numbers."""

    def __init__(self, spoiled_token: int) -> None:
        super().__init__(CAPACITY, 8)
        self._spoiled_token = spoiled_token

    def step(self, batch: Batch) -> StepResult:
        result = super().step(batch)
        lengths = (batch.starts + batch.lengths)[batch.samples]
        before = self.token_of[batch.rows[batch.samples], lengths - 1]
        result.token_ids[before == self._spoiled_token] = -1
        return result


@both_depths
def test_a_sequence_without_logits_fails_and_the_others_go_on(depth) -> None:
    """-1 also pads the ending ids, and must end nothing as an EOS would."""
    requests = [make_request(uid, 3 + index, max_tokens=12) for index, uid in enumerate("abc")]
    requests.append(make_request("d", 9, max_tokens=3, n=2))
    expected = {request.uid: expected_answer(request, frozenset({EOS}))[0] for request in requests}
    others = {token for uid in "acd" for token in expected[uid]}
    kept, spoiled_token = next(pair for pair in enumerate(expected["b"], 1) if pair[1] not in others)
    router = make_router(eos_ids=frozenset({EOS}))
    loop = EngineLoop(router, SpoiledRunner(spoiled_token), depth)
    for request in requests:
        loop.submit(request)
    loop.run()
    assert loop.answer("b") == (expected["b"][:kept], FinishReason.FAILED)
    assert loop.chunks["b"][-1].error is NOT_NUMBERS
    for uid in ("a", "c", "d"):
        assert loop.answer(uid)[0] == expected[uid]
    assert loop.answer("d/1")[1] in (FinishReason.LENGTH, FinishReason.STOP)
    assert router.ended_requests["failed"] == 1
    assert router.stats().kv_tokens_used == 0


def test_a_prompt_whose_log_probabilities_are_not_numbers_fails() -> None:
    """In the middle of its prefill, too."""
    router = make_router(batch_max_tokens=4)
    submit(router, make_request("a", 7, prompt_logprobs=0))
    submit(router, make_request("b", 2))
    batch = router.next_batch()
    scores = Scores(np.array([-1.0, np.nan, -2.0, -1.0], np.float32), np.empty((4, 0), np.int32), np.empty((4, 0)))
    chunk = only_chunk(as_chunks(router.apply(batch, replace(sampled(batch, 1), scores=(scores,)))))
    assert (chunk.uid, chunk.finish_reason, chunk.error) == ("a", FinishReason.FAILED, NOT_NUMBERS)
    router.check_integrity()
    batch = router.next_batch()
    assert only_chunk(as_chunks(router.apply(batch, sampled(batch, 1)))).uid == "b"


def test_a_failed_step_ends_everybody_and_the_router_goes_on() -> None:
    router = make_router(max_running=2, batch_max_tokens=4)
    for uid in ("a", "b", "c"):
        submit(router, make_request(uid, 3))
    router.next_batch()
    router.next_batch()
    error = RequestError("INTERNAL", "the step failed")
    router.fail_all(error)
    chunks = router.drain_finished()
    assert [(chunk.uid, chunk.finish_reason, chunk.error) for chunk in chunks] == [
        (uid, FinishReason.FAILED, error) for uid in ("a", "b", "c")
    ]
    router.check_integrity()
    assert router.stats().kv_tokens_used == 0
    submit(router, make_request("d", 3, max_tokens=1))
    batch = router.next_batch()
    assert only_chunk(as_chunks(router.apply(batch, sampled(batch, 1)))).finish_reason is FinishReason.LENGTH


def test_a_router_that_is_closed_ends_everybody_and_refuses_the_rest() -> None:
    router = make_router(max_running=1)
    submit(router, make_request("runs", 3, max_tokens=4))
    batch = router.next_batch()
    submit(router, make_request("waits", 3))
    error = RequestError("UNAVAILABLE", "the server is stopped")
    router.close(error)
    assert [(chunk.uid, chunk.error) for chunk in router.drain_finished()] == [("runs", error), ("waits", error)]
    assert as_chunks(router.apply(batch, sampled(batch, 1))) == [], "the step in flight still comes to its end"
    router.check_integrity()
    with pytest.raises(RequestError, match="^UNAVAILABLE: the server is stopped$"):
        submit(router, make_request("late", 3))


def test_a_router_that_is_drained_ends_those_that_never_ran() -> None:
    router = make_router(max_running=1)
    submit(router, make_request("runs", 3, max_tokens=1))
    batch = router.next_batch()
    submit(router, make_request("waits", 3))
    error = RequestError("UNAVAILABLE", "the server is shutting down")
    router.close(error, drain=True)
    router.close(error, drain=True)
    assert [(chunk.uid, chunk.error) for chunk in router.drain_finished()] == [("waits", error)]
    with pytest.raises(RequestError, match="^UNAVAILABLE: the server is shutting down$"):
        submit(router, make_request("late", 3))
    assert only_chunk(as_chunks(router.apply(batch, sampled(batch, 1)))).finish_reason is FinishReason.LENGTH
    router.check_integrity()
    assert not router.has_work


# What chunks and metrics say


def test_log_probs_only_where_they_were_asked_for() -> None:
    loop = make_loop(depth=1)
    loop.submit(make_request("with", 3, return_log_probs=True))
    loop.submit(make_request("without", 3))
    loop.run()
    for chunk in loop.chunks["with"]:
        assert chunk.log_probs == [-token - 0.5 for token in chunk.token_ids]
    assert all(chunk.log_probs == [] for chunk in loop.chunks["without"])


def test_the_first_chunk_alone_says_how_long_the_queue_was() -> None:
    clock = Clock()
    loop = make_loop(depth=0, clock=clock)
    loop.submit(make_request("a", 3, max_tokens=3))
    clock.now += 0.5
    for _ in range(3):
        loop.step()
        clock.now += 1
    assert [chunk.queue_seconds for chunk in loop.chunks["a"]] == [0.5, None, None]


def test_stats_count_what_happened() -> None:
    router = make_router(max_running=1)
    submit(router, make_request("a", 5, max_tokens=2))
    submit(router, make_request("b", 7))
    batch = router.next_batch()
    router.apply(batch, replace(sampled(batch, 1), seconds=0.5, launch_seconds=0.125))
    router.cancel("b")
    stats = router.stats()
    assert (stats.device_seconds_total, stats.launch_seconds_total) == (0.5, 0.125)
    assert (stats.queued_requests, stats.running_requests) == (0, 1)
    assert (stats.kv_tokens_used, stats.kv_tokens_total) == (5, CAPACITY)
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (5, 1)
    assert router.ended_requests == {"stop": 0, "length": 0, "cancelled": 1, "failed": 0, "rejected": 0}


def test_batches_are_applied_in_order() -> None:
    router = make_router()
    submit(router, make_request("a", 3))
    router.next_batch()
    second = router.next_batch()
    with pytest.raises(AssertionError, match="in the order"):
        router.apply(second, sampled(second, 1))
