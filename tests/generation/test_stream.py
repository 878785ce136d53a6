# SPDX-License-Identifier: Apache-2.0
"""One stream, with stand-ins around it: credit, coalescing, errors, stop strings, and a client that goes away."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from lightllm_backend.generation import send_queue as send_queue_module
from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.stream import Stream
from lightllm_backend.request import FinishReason, RequestError, TokenChunk
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from tests.generation.stand_ins import FakeObserver, FakeResponder


class PromptStream(Stream):
    """Sends at once what it may."""

    def __init__(self, *arguments: Any) -> None:
        self.send_queue = SendQueue(num_threads=0)
        super().__init__(*arguments, self.send_queue)

    def on_chunk(self, chunk: TokenChunk) -> bool:
        stop = super().on_chunk(chunk)
        self.send_all()
        return stop

    def delivered(self, state: bytes | None = None) -> None:
        super().delivered(state)
        self.send_all()

    def lost(self) -> None:
        super().lost()
        self.send_all()

    def send_all(self) -> None:
        while self.send_queue.send_next():
            pass


def stream_of(streaming: bool = True, flow_control: bool = True) -> tuple[Stream, FakeResponder, FakeObserver]:
    responder, observer = FakeResponder(), FakeObserver()
    return PromptStream(responder, streaming, flow_control, None, observer), responder, observer


def chunk(ids: list[int], reason: FinishReason | None = None, **fields: Any) -> TokenChunk:
    return TokenChunk("u", ids, fields.pop("log_probs", []), reason, num_prompt_tokens=3, **fields)


# Credit and coalescing


def test_tokens_made_while_a_chunk_is_on_its_way_are_one_chunk() -> None:
    stream, responder, observer = stream_of()
    stream.on_chunk(chunk([1], log_probs=[-1.0], queue_seconds=0.5))
    stream.on_chunk(chunk([2], log_probs=[-2.0], top_log_probs=b"2"))
    stream.on_chunk(chunk([3], log_probs=[-3.0], top_log_probs=b"3"))
    assert responder.ids == [[1]]
    stream.delivered()
    assert responder.ids == [[1], [2, 3]]
    assert responder.last.log_probs == [-2.0, -3.0]
    assert responder.last.top_log_probs == b"23"
    stream.delivered()
    stream.on_chunk(chunk([4]))
    assert responder.ids == [[1], [2, 3], [4]]
    assert (observer.first, observer.between) == ([0.5], 3)


def test_the_last_chunk_waits_for_the_one_before_it_and_takes_all_along() -> None:
    stream, responder, observer = stream_of()
    stream.on_chunk(chunk([1], queue_seconds=0.25, num_cached_tokens=2))
    stream.on_chunk(chunk([2]))
    stream.on_chunk(chunk([3], FinishReason.LENGTH))
    assert responder.ids == [[1]]
    assert not stream.ended
    stream.delivered()
    assert responder.ids == [[1], [2, 3]]
    assert responder.last.finish_reason is FinishReason.LENGTH
    assert stream.ended
    stream.delivered()
    stream.on_chunk(chunk([4]))  # whatever comes after the end is dropped
    assert responder.ids == [[1], [2, 3]]
    [ended] = observer.requests
    assert (ended.status, ended.num_prompt_tokens, ended.num_cached_tokens, ended.num_answer_tokens) == (
        "length",
        3,
        2,
        3,
    )
    assert ended.queue_seconds == 0.25
    assert ended.first_token_seconds is not None
    assert 0 <= ended.first_token_seconds <= ended.seconds
    assert all(0 <= seconds < 60 for seconds in observer.seconds)


def test_each_chunk_has_the_state_in_which_the_one_before_it_has_left_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "CHECK_SECONDS", 0.0)
    stream, responder, _ = stream_of()
    stream.on_chunk(chunk([1]))
    stream.on_chunk(chunk([2]))
    stream.delivered(b"one")
    stream.delivered(b"two")
    stream.check_client()
    assert responder.probes == 1
    stream.on_chunk(chunk([3]))
    stream.delivered()  # a probe has no state
    stream.on_chunk(chunk([4], FinishReason.STOP))
    stream.delivered(b"three")
    assert responder.ids == [[1], [2], [3], [4]]
    assert responder.states == [None, b"one", b"two", b"three"]


def test_a_direct_call_needs_no_credit() -> None:
    stream, responder, _ = stream_of(flow_control=False)
    for token in (1, 2, 3):
        stream.on_chunk(chunk([token]))
    assert responder.ids == [[1], [2], [3]]


@pytest.mark.parametrize("flow_control", [True, False])
def test_without_streaming_there_is_one_chunk(flow_control: bool) -> None:
    stream, responder, _ = stream_of(streaming=False, flow_control=flow_control)
    stream.on_chunk(chunk([1], queue_seconds=0.25))
    stream.on_chunk(chunk([2]))
    stream.delivered()
    assert responder.sent == []
    stream.on_chunk(chunk([3], FinishReason.STOP))
    assert responder.sent == [chunk([1, 2, 3], FinishReason.STOP, queue_seconds=0.25)]


def test_tokens_that_come_while_the_stream_waits_in_the_send_queue_go_along() -> None:
    send_queue, responder = SendQueue(num_threads=0), FakeResponder()
    stream = Stream(responder, True, True, None, FakeObserver(), send_queue)
    for token in (1, 2, 3):
        stream.on_chunk(chunk([token]))
    assert responder.sent == []
    assert send_queue.send_next()
    assert responder.ids == [[1, 2, 3]]
    assert not send_queue.send_next()


def test_the_last_chunk_overtakes_the_stream_that_waits() -> None:
    send_queue, responders = SendQueue(num_threads=0), [FakeResponder(), FakeResponder()]
    streams = [Stream(responder, True, True, None, FakeObserver(), send_queue) for responder in responders]
    for stream in streams:
        stream.on_chunk(chunk([1]))
    while send_queue.send_next():
        pass
    for stream in streams:
        stream.delivered()
        stream.on_chunk(chunk([2]))
    streams[1].on_chunk(chunk([3], FinishReason.STOP))
    assert send_queue.send_next()
    assert [responder.ids for responder in responders] == [[[1]], [[1], [2, 3]]]
    while send_queue.send_next():
        pass
    assert [responder.ids for responder in responders] == [[[1], [2]], [[1], [2, 3]]]


@pytest.mark.parametrize("flow_control", [False, True])
def test_tokens_that_come_while_a_chunk_is_sent_neither_wait_nor_overtake(flow_control) -> None:
    class SlowResponder(FakeResponder):
        def __init__(self) -> None:
            super().__init__()
            self.busy, self.may_return = threading.Semaphore(0), threading.Semaphore(0)

        def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:
            assert self.busy._value == 0, "one at a time"
            super().send(chunk, state, check_client)
            self.busy.release()
            assert self.may_return.acquire(timeout=10)

    responder, send_queue = SlowResponder(), SendQueue(num_threads=3)
    stream = Stream(responder, True, flow_control, None, FakeObserver(), send_queue)
    stream.on_chunk(TokenChunk("a", [1], []))
    for expected in ([1], [2, 3], [4, 5]):
        assert responder.busy.acquire(timeout=10)
        assert responder.last.token_ids == expected
        first, began = expected[-1] + 1, time.monotonic()
        for token in (first, first + 1):
            stream.on_chunk(TokenChunk("a", [token], []))  # here, while it is being sent
        assert time.monotonic() - began < 5
        assert responder.last.token_ids == expected
        responder.may_return.release()
        if flow_control:
            stream.delivered()
    assert responder.busy.acquire(timeout=10)
    responder.may_return.release()
    send_queue.close()
    assert responder.ids == [[1], [2, 3], [4, 5], [6, 7]]


def test_a_stream_that_waited_twice_keeps_no_place_when_it_has_ended(monkeypatch) -> None:
    """Its last chunk overtakes in the urgent line, and its turn in the other one comes when there is nothing left."""
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", 1)
    send_queue = SendQueue(num_threads=0)
    responders = [FakeResponder(), FakeResponder()]
    one, other = (Stream(responder, True, True, None, FakeObserver(), send_queue) for responder in responders)
    for stream in (one, other):
        stream.on_chunk(TokenChunk("a", [1], []))
        assert send_queue.send_next()
        stream.delivered()
    one.on_chunk(TokenChunk("a", [2], []))
    one.on_chunk(TokenChunk("a", [3], [], FinishReason.LENGTH))
    other.on_chunk(TokenChunk("b", [4], []))
    while send_queue.send_next():
        pass
    assert [responder.ids for responder in responders] == [[[1], [2, 3]], [[1], [4]]]


# Errors


def test_an_error_after_tokens_goes_alone_behind_them() -> None:
    stream, responder, observer = stream_of()
    stream.on_chunk(chunk([1]))
    stream.on_chunk(chunk([2]))
    error = RequestError("INTERNAL", "broken")
    stream.on_chunk(chunk([3], FinishReason.FAILED, error=error))
    stream.delivered()
    assert responder.ids == [[1], [2, 3]], "the error waits for them"
    stream.delivered()
    assert responder.ids == [[1], [2, 3], []]
    assert [sent.finish_reason for sent in responder.sent] == [None, None, FinishReason.FAILED]
    assert [sent.error for sent in responder.sent] == [None, None, error]
    assert observer.ended == ["failed"]


def test_an_error_of_a_direct_call_follows_its_tokens_at_once() -> None:
    stream, responder, _ = stream_of(flow_control=False)
    stream.on_chunk(chunk([1], FinishReason.FAILED, error=RequestError("INTERNAL", "broken")))
    assert responder.ids == [[1], []]
    assert stream.ended


def test_an_error_of_a_request_that_does_not_stream_is_all_it_gets() -> None:
    stream, responder, _ = stream_of(streaming=False)
    stream.on_chunk(chunk([1]))
    stream.on_chunk(chunk([], FinishReason.FAILED, error=RequestError("INTERNAL", "broken")))
    assert responder.ids == [[]]


def test_an_error_before_any_token_is_the_first_and_last() -> None:
    stream, responder, _ = stream_of()
    stream.on_chunk(chunk([], FinishReason.FAILED, error=RequestError("UNAVAILABLE", "no")))
    assert responder.ids == [[]]


def test_a_deadline_counts_as_cancelled() -> None:
    stream, _, observer = stream_of()
    stream.on_chunk(chunk([], FinishReason.CANCELLED, error=RequestError("CANCELLED", "too late")))
    assert observer.ended == ["cancelled"]


# Stop strings


def stop_stream(tokenizer: Tokenizer, **options: Any) -> tuple[Stream, FakeResponder]:
    responder = FakeResponder()
    text = TextStream(tokenizer, ("END",), **options)
    return PromptStream(responder, True, False, text, FakeObserver()), responder


def test_a_stop_string_over_chunks_ends_the_request_and_drops_what_follows(tokenizer: Tokenizer) -> None:
    stream, responder = stop_stream(tokenizer)
    ids = [tokenizer.encode(letter)[0] for letter in "aENDxy"]
    assert not stream.on_chunk(chunk(ids[:2]))
    assert stream.on_chunk(chunk(ids[2:], log_probs=[-1.0, -2.0, -3.0, -4.0], top_log_probs=b"aabbccdd"))
    assert responder.ids == [ids[:2], ids[2:4]]
    assert responder.last.log_probs == [-1.0, -2.0]
    assert responder.last.top_log_probs == b"aabb"
    assert responder.last.finish_reason is FinishReason.STOP
    assert not stream.on_chunk(chunk([1], FinishReason.STOP)), "the engine's own end comes after ours"
    assert len(responder.sent) == 2


def test_a_stop_string_in_the_engine_s_last_chunk_says_stop(tokenizer: Tokenizer) -> None:
    stream, responder = stop_stream(tokenizer)
    ids = [tokenizer.encode(letter)[0] for letter in "ENDx"]
    stream.on_chunk(chunk(ids, FinishReason.LENGTH))
    assert (responder.ids, responder.last.finish_reason) == ([ids[:3]], FinishReason.STOP)


def test_min_tokens_lets_an_early_stop_string_pass(tokenizer: Tokenizer) -> None:
    stream, responder = stop_stream(tokenizer, min_tokens=3)
    ids = [tokenizer.encode(letter)[0] for letter in "END"]
    assert not stream.on_chunk(chunk(ids))
    assert responder.ids == [ids]


# Clients that go away


def test_a_direct_call_asks_the_server_and_never_after_the_end() -> None:
    stream, responder, _ = stream_of(flow_control=False)
    assert not stream.check_client()
    responder.cancelled = True
    assert stream.check_client()
    stream.on_chunk(chunk([], FinishReason.CANCELLED))
    asked = responder.questions
    assert not stream.check_client()
    assert responder.questions == asked


def test_in_the_ensemble_the_next_chunk_asks_if_chunks_are_coming() -> None:
    stream, responder, _ = stream_of()
    stream.on_chunk(chunk([1]))
    for _ in range(2):
        stream.check_client()
    stream.delivered()
    stream.check_client()
    assert responder.probes == 0
    for token in (2, 3):
        stream.on_chunk(chunk([token]))
        stream.delivered()
    assert responder.checks == [False, True, False]


def test_in_the_ensemble_a_probe_takes_the_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHECK_SECONDS", 0.0)
    stream, responder, _ = stream_of()
    assert not stream.check_client()
    assert not stream.check_client()
    assert responder.probes == 1, "a second one would wait behind the first"
    assert responder.questions == 0
    stream.on_chunk(chunk([1]))
    assert responder.sent == []
    stream.delivered()
    assert responder.ids == [[1]]
    stream.delivered()
    stream.on_chunk(chunk([2], FinishReason.STOP))
    stream.check_client()
    assert responder.probes == 1


def test_a_stream_that_waits_in_the_send_queue_is_not_probed_and_keeps_its_place() -> None:
    send_queue, responder = SendQueue(num_threads=0), FakeResponder()
    stream = Stream(responder, True, True, None, FakeObserver(), send_queue)
    stream.on_chunk(chunk([1]))
    stream.check_client()
    assert responder.probes == 0
    assert send_queue.send_next()
    assert responder.ids == [[1]]
