# SPDX-License-Identifier: Apache-2.0
"""Streams: one chunk of credit, coalescing, stop strings, errors, and clients that go away; with stand-ins around."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightllm_backend.generation import send_queue as send_queue_module
from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation import streams as streams_module
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.stream import Stream
from lightllm_backend.generation.streams import Streams
from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.messages.channel import Channel, ChannelClosed, Message
from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered, Introduction
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from tests.polling import poll

SEAL = Seal(b"k" * 32, Purpose.RETURNS)


class FakeResponder:
    def __init__(self) -> None:
        self.sent: list[TokenChunk] = []
        self.states: list[bytes | None] = []  # of decoding, which went along
        self.checks: list[bool] = []
        self.probes = 0
        self.cancelled = False
        self.questions = 0

    def send(self, chunk: TokenChunk, state: bytes | None, check_client: bool) -> None:
        assert not self.sent or self.last.finish_reason is None, "nothing may follow the last chunk"
        self.sent.append(chunk)
        self.states.append(state)
        self.checks.append(check_client)

    def probe(self) -> None:
        assert not self.sent or self.last.finish_reason is None, "nothing may follow the last chunk"
        self.probes += 1

    def is_cancelled(self) -> bool:
        self.questions += 1
        return self.cancelled

    @property
    def ids(self) -> list[list[int]]:
        return [chunk.token_ids for chunk in self.sent]

    @property
    def last(self) -> TokenChunk:
        return self.sent[-1]


class FakeObserver:
    def __init__(self) -> None:
        self.first: list[float] = []
        self.between = 0
        self.ended: list[str] = []
        self.requests: list[EndedRequest] = []
        self.seconds: list[float] = []

    def first_token(self, seconds: float, queue_seconds: float) -> None:
        self.seconds.append(seconds)
        self.first.append(queue_seconds)

    def next_token(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.between += 1

    def finished(self, ended: EndedRequest) -> None:
        self.requests.append(ended)
        self.seconds.append(ended.seconds)
        self.ended.append(ended.status)


class FakeEngine:
    """Takes requests; a test makes their chunks."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.on_chunk: dict[str, Callable[[TokenChunk], None]] = {}
        self.stopped: list[str] = []
        self.cancelled: list[str] = []
        self.refusal: RequestError | None = None
        self._numbers = itertools.count()

    def new_uid(self) -> str:
        return f"u{next(self._numbers)}"

    def submit(self, request: Request, on_chunk: Callable[[TokenChunk], None]) -> None:
        if self.refusal:
            raise self.refusal
        self.requests[request.uid], self.on_chunk[request.uid] = request, on_chunk

    def stop(self, uid: str) -> None:
        self.stopped.append(uid)

    def cancel(self, uid: str) -> None:
        self.cancelled.append(uid)

    def make(self, uid: str, ids: list[int], reason: FinishReason | None = None, **fields: Any) -> None:
        on_chunk = self.on_chunk[uid.partition("/")[0]]
        on_chunk(TokenChunk(uid, ids, fields.pop("log_probs", []), reason, **fields))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(__file__).parents[1] / "data" / "byte_level")


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


class WatchersTime:
    """The clock of a watcher, and the event for which it waits: that `seconds` have passed."""

    def __init__(self, seconds: float) -> None:
        self.now, self._end = 0.0, seconds

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self._end


@pytest.mark.parametrize(("check_seconds", "seconds_between"), [(0.01, 0.25), (0.05, 0.5), (9.0, 1.0)])
def test_the_longer_a_check_takes_the_fewer_there_are(
    monkeypatch: pytest.MonkeyPatch, check_seconds: float, seconds_between: float
) -> None:
    clock, begun, ended = WatchersTime(100), list[float](), list[float]()

    def check_client() -> bool:
        begun.append(clock.now)
        clock.now += check_seconds
        ended.append(clock.now)
        return False

    monkeypatch.setattr(streams_module, "time", clock)
    streams = Streams.__new__(Streams)  # without its threads
    streams._closing = clock  # type: ignore[assignment]
    streams._send_queue = SendQueue(num_threads=0)
    streams._streams = {"u": SimpleNamespace(last_check=-10.0, check_client=check_client)}  # type: ignore[dict-item]
    streams._watch_clients()
    pauses = [after - before for before, after in zip(ended, begun[1:], strict=False)]
    assert min(pauses) >= seconds_between - 1e-9
    assert max(pauses) <= seconds_between + 0.25 + 1e-9


def test_many_clients_are_checked_a_few_at_a_time_and_all_within_a_second_and_a_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = WatchersTime(10)
    checked_at: dict[int, list[float]] = {number: [] for number in range(1000)}

    class Checked:
        last_check = 0.0

        def __init__(self, number: int) -> None:
            self.number = number

        def check_client(self) -> bool:
            clock.now += 0.0001
            self.last_check = clock.now
            checked_at[self.number].append(clock.now)
            return False

    monkeypatch.setattr(streams_module, "time", clock)
    streams = Streams.__new__(Streams)  # without its threads
    streams._closing = clock  # type: ignore[assignment]
    streams._send_queue = SendQueue(num_threads=0)
    streams._streams = {str(number): Checked(number) for number in checked_at}  # type: ignore[misc]
    streams._watch_clients()
    moments = sorted(itertools.chain(*checked_at.values()))
    pairs = zip(moments, moments[streams_module.CHECKS_AT_ONCE :], strict=False)
    assert min(after - before for before, after in pairs) > 0.01, "chunks have their turn"
    assert all(max(np.diff(times)) < 1.5 for times in checked_at.values())


# All streams of a process


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def streams(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    for module in (stream_module, streams_module):
        monkeypatch.setattr(module, "CHECK_SECONDS", 0.02)
    made = Streams(engine, FakeObserver(), str(tmp_path / "returns"), SEAL)  # type: ignore[arg-type]
    yield made
    made.close()


def introduced(streams: Streams) -> Channel:
    """A detokenizer's end of the return channel."""
    channel = Channel.connect(streams.return_address)
    channel.send(Introduction.under(SEAL))
    return channel


def submit(streams: Streams, tokenizer: Tokenizer, flow_control: bool = True, **sampling: Any) -> FakeResponder:
    responder = FakeResponder()
    options = RequestOptions(SamplingParams(**sampling), stream=True)
    text = TextStream.of(tokenizer, options, [1, 2])
    streams.submit([1, 2], options, 12.5, lambda uid, number: responder, flow_control, lambda: text)
    return responder


def test_a_request_goes_to_the_engine_and_its_chunks_come_back(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    responder = submit(streams, tokenizer, max_tokens=3)
    assert engine.requests == {"u0": Request("u0", (1, 2), SamplingParams(max_tokens=3), 12.5)}
    engine.make("u0", [5], FinishReason.LENGTH)
    assert poll(lambda: responder.ids == [[5]])
    assert poll(lambda: streams._streams == {})


def test_each_answer_has_its_stream_and_all_are_cancelled_together(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    responders: dict[str, FakeResponder] = {}

    def responder_for(uid: str, number: int) -> FakeResponder:
        responders[uid] = FakeResponder()
        assert uid == ("u0" if number == 0 else f"u0/{number}")
        return responders[uid]

    sampling = SamplingParams(n=3, stop_words=("never",))
    options = RequestOptions(sampling, stream=True)
    streams.submit([1, 2], options, None, responder_for, True, lambda: TextStream.of(tokenizer, options, [1, 2]))
    channel = introduced(streams)
    for number, uid in enumerate(responders):
        engine.make(uid, [number])
    assert poll(lambda: [one.ids for one in responders.values()] == [[[0]], [[1]], [[2]]])
    channel.send(Delivered("u0/1", b"one"))
    engine.make("u0/1", [7])
    assert poll(lambda: responders["u0/1"].states == [None, b"one"])
    channel.send(ClientGone("u0/2"))
    assert poll(lambda: sorted(engine.cancelled) == ["u0", "u0/1", "u0/2"])
    failure = RequestError("CANCELLED", "too late")
    for uid in responders:
        engine.make(uid, [], FinishReason.CANCELLED, error=failure)
    assert poll(lambda: streams._streams == {} == streams._answers)
    channel.close()


def test_a_request_keeps_its_tenant_and_its_priority(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    options = RequestOptions(tenant="a", priority=-3)
    text = TextStream.of(tokenizer, options, [1, 2])
    streams.submit([1, 2], options, None, lambda uid, number: FakeResponder(), False, lambda: text)
    assert (engine.requests["u0"].tenant, engine.requests["u0"].priority) == ("a", -3)


def test_a_probe_counts_in_no_metric(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    observer, options = FakeObserver(), RequestOptions()
    streams = Streams(engine, observer)  # type: ignore[arg-type]

    def new_text() -> TextStream:
        return TextStream.of(tokenizer, options, [1, 2])

    for urgent in (True, False):
        streams.submit([1, 2], options, None, lambda uid, number: FakeResponder(), False, new_text, urgent)
    engine.make("u0", [5], FinishReason.CANCELLED)
    assert (observer.first, observer.ended) == ([], [])
    engine.make("u1", [5], FinishReason.LENGTH)
    assert observer.ended == ["length"]
    streams.close()


def test_a_refused_request_leaves_nothing_behind(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.refusal = RequestError("UNAVAILABLE", "no engine")
    with pytest.raises(RequestError, match="no engine"):
        submit(streams, tokenizer)
    assert streams._streams == {}


def test_a_stop_string_tells_the_engine(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    responder = submit(streams, tokenizer, stop_words=("b",))
    engine.make("u0", tokenizer.encode("abc"))
    assert engine.stopped == ["u0"]
    assert poll(lambda: responder.sent)
    assert responder.last.finish_reason is FinishReason.STOP
    engine.make("u0", [], FinishReason.STOP)
    assert streams._streams == {}
    assert len(responder.sent) == 1


def test_a_request_whose_tokens_cannot_be_handled_ends_alone(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: TextStream, token_ids: list[int]) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(Stream, "check_client", lambda stream: False)  # nobody would acknowledge a probe
    other = submit(streams, tokenizer)
    responder = submit(streams, tokenizer, stop_words=("b",))
    monkeypatch.setattr(TextStream, "push", fail)
    engine.make("u1", [5])  # raises nothing: the thread that reads all requests' tokens goes on
    assert poll(lambda: responder.sent)
    assert str(responder.last.error) == "INTERNAL: the tokens could not be handled: ValueError('no such token')"
    assert engine.cancelled == ["u1"]
    engine.make("u1", [], FinishReason.CANCELLED)
    engine.make("u0", [6])
    assert poll(lambda: other.ids == [[6]])
    assert len(responder.sent) == 1


def test_the_watch_over_clients_survives_a_question_that_fails(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    broken, sound = (submit(streams, tokenizer, flow_control=False) for _ in range(2))
    broken.is_cancelled = None  # type: ignore[assignment, method-assign]
    assert poll(lambda: sound.questions > 2)
    sound.cancelled = True
    assert poll(lambda: engine.cancelled == ["u1"])


def test_a_detokenizer_may_connect_after_one_could_not(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failed = Channel.accept, []

    def fail_once(listener: Any) -> Channel:
        channel = accept(listener)
        if not failed:
            failed.append(channel)
            channel.close()
            raise OSError("too many open files")
        return channel

    # The thread already waits in the real one; this is what it calls next.
    monkeypatch.setattr(Channel, "accept", fail_once)
    waiting = Channel.connect(streams.return_address)
    refused = Channel.connect(streams.return_address)
    assert poll(lambda: failed)
    returns = ReturnChannel(streams.return_address, SEAL)
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    engine.make("u0", [2])
    returns.send(Delivered("u0", b"state"))
    assert poll(lambda: responder.ids == [[1], [2]])
    waiting.close()
    refused.close()


def test_the_return_channel_gives_credit_and_tells_who_has_gone(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    returns = ReturnChannel(streams.return_address, SEAL)
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    engine.make("u0", [2])
    returns.send(Delivered("u0", b"state"))
    assert poll(lambda: responder.ids == [[1], [2]])
    assert responder.states == [None, b"state"]
    returns.send(Delivered("unknown", None))
    returns.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])


def test_after_a_failure_of_the_detokenizer_only_the_end_is_sent(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    channel = introduced(streams)
    channel.send(DecodingFailed("u0", "KeyError: 7"))
    assert poll(lambda: engine.cancelled == ["u0"])
    assert "the detokenizer failed on request u0: KeyError: 7" in caplog.text
    channel.close()
    engine.make("u0", [2])
    engine.make("u0", [], FinishReason.CANCELLED)
    assert poll(lambda: responder.ids == [[1], [2]])
    assert poll(lambda: streams._streams == {})


def test_a_request_whose_chunk_was_lost_is_cancelled_and_ends(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    assert engine.cancelled == []
    monkeypatch.setattr(stream_module, "ACKNOWLEDGEMENT_SECONDS", 0.0)
    assert poll(lambda: "u0" in engine.cancelled)
    engine.make("u0", [], FinishReason.CANCELLED)
    assert poll(lambda: responder.ids == [[1], []])


def test_who_calls_the_steps_one_by_one_and_goes_is_noticed(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody acknowledges the chunk, but the server knows the caller."""
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    responder.cancelled = True
    monkeypatch.setattr(stream_module, "OVERDUE_SECONDS", 0.0)
    assert poll(lambda: "u0" in engine.cancelled)


def test_chunks_that_nobody_acknowledges_hold_others_up_for_a_moment_only(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detokenizer that stands still has 48 chunks, and the other one could go on."""
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(send_queue_module, "OVERDUE_SECONDS", 0.1)
    monkeypatch.setattr(Stream, "check_client", lambda stream: False)  # nobody would acknowledge a probe
    stuck = [submit(streams, tokenizer) for _ in range(2)]
    going = submit(streams, tokenizer)
    for number, responder in enumerate([*stuck, going]):
        engine.make(f"u{number}", [1])
        assert poll(lambda responder=responder: responder.ids == [[1]])
    returns = ReturnChannel(streams.return_address, SEAL)
    for token in (2, 3, 4):
        engine.make("u2", [token])
        returns.send(Delivered("u2", None))
        assert poll(lambda token=token: going.ids[-1] == [token])
    assert [responder.ids for responder in stuck] == [[[1]], [[1]]], "each has its one chunk in flight"


def test_what_is_in_flight_at_the_end_is_not_waited_for(
    engine: FakeEngine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    streams = Streams(engine, FakeObserver(), str(tmp_path / "returns"), SEAL)  # type: ignore[arg-type]
    responder = submit(streams, tokenizer)
    engine.make("u0", [1])
    assert poll(lambda: responder.ids == [[1]])
    engine.make("u0", [], FinishReason.CANCELLED)
    streams.close()
    assert responder.ids == [[1], []]


def test_several_detokenizers_give_credit(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    channels = [introduced(streams) for _ in range(3)]
    responder = submit(streams, tokenizer)
    for number, channel in enumerate(channels):
        engine.make("u0", [number])
        assert poll(lambda number=number: len(responder.sent) == number + 1)
        channel.send(Delivered("u0", str(number).encode()))
    engine.make("u0", [], FinishReason.STOP)
    assert poll(lambda: responder.ids == [[0], [1], [2], []])
    assert responder.states == [None, b"0", b"1", b"2"]
    for channel in channels:
        channel.close()


@pytest.mark.parametrize(
    "first", [ClientGone("u0"), Introduction.under(Seal(b"x" * 32, Purpose.RETURNS)), Introduction(b"")]
)
def test_nobody_is_listened_to_without_this_servers_introduction(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, first: Message
) -> None:
    submit(streams, tokenizer)
    stranger, own = Channel.connect(streams.return_address), introduced(streams)
    stranger.send(first)
    with pytest.raises(ChannelClosed):
        stranger.receive()  # it has been hung up on
    assert engine.cancelled == []
    own.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])
    own.close()


def test_another_detokenizer_may_connect_after_the_first(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    Channel.connect(streams.return_address).close()
    responder = submit(streams, tokenizer)
    channel = introduced(streams)
    assert poll(lambda: responder.probes > 0)  # its credit is taken until this channel says otherwise
    engine.make("u0", [1])
    channel.send(Delivered("u0", None))
    assert poll(lambda: responder.ids == [[1]])
    channel.send(ClientGone("u0"))
    assert poll(lambda: engine.cancelled == ["u0"])
    channel.close()


def test_a_quiet_direct_call_is_asked_about(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    gone = submit(streams, tokenizer, flow_control=False)
    there = submit(streams, tokenizer, flow_control=False)
    gone.cancelled = True
    assert poll(lambda: "u0" in engine.cancelled)
    assert there.probes == gone.probes == 0
    assert "u1" not in engine.cancelled


def test_a_quiet_stream_of_the_ensemble_is_probed(streams: Streams, tokenizer: Tokenizer) -> None:
    responder = submit(streams, tokenizer)
    assert poll(lambda: responder.probes == 1)


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
