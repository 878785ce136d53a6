# SPDX-License-Identifier: Apache-2.0
"""All streams of a process, with stand-ins around them: requests, their ends, and the watch over clients."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightllm_backend.generation import stream as stream_module
from lightllm_backend.generation import streams as streams_module
from lightllm_backend.generation.send_queue import SendQueue
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.return_messages import ClientGone, Delivered
from lightllm_backend.request import FinishReason, Request, RequestError, RequestOptions, SamplingParams
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer
from tests.generation.stand_ins import SEAL, FakeEngine, FakeObserver, FakeResponder, introduced, submit
from tests.polling import poll


@pytest.mark.usefixtures("without_probes")
def test_a_request_goes_to_the_engine_and_its_chunks_come_back(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    responder = submit(streams, tokenizer, max_tokens=3)
    assert engine.requests == {"u0": Request("u0", (1, 2), SamplingParams(max_tokens=3), 12.5)}
    engine.make("u0", [5], FinishReason.LENGTH)
    assert poll(lambda: responder.ids == [[5]])
    assert poll(lambda: streams._streams == {})


@pytest.mark.usefixtures("without_probes")
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


@pytest.mark.usefixtures("without_probes")
def test_a_stop_string_tells_the_engine(streams: Streams, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    responder = submit(streams, tokenizer, stop_words=("b",))
    engine.make("u0", tokenizer.encode("abc"))
    assert engine.stopped == ["u0"]
    assert poll(lambda: responder.sent)
    assert responder.last.finish_reason is FinishReason.STOP
    engine.make("u0", [], FinishReason.STOP)
    assert streams._streams == {}
    assert len(responder.sent) == 1


@pytest.mark.usefixtures("without_probes")
def test_a_request_whose_tokens_cannot_be_handled_ends_alone(
    streams: Streams, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: TextStream, token_ids: list[int]) -> str:
        raise ValueError("no such token")

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


# The watch over clients


class WatchersTime:
    """The clock of a watcher, and the event for which it waits: that `seconds` have passed."""

    def __init__(self, seconds: float) -> None:
        self.now, self._end = 0.0, seconds

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self._end

    def watch(self, streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the watcher over these streams until the end."""
        monkeypatch.setattr(streams_module, "time", self)
        watched = Streams.__new__(Streams)  # without its threads
        watched._closing = self  # type: ignore[assignment]
        watched._send_queue = SendQueue(num_threads=0)
        watched._streams = streams
        watched._watch_clients()


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

    clock.watch({"u": SimpleNamespace(last_check=-10.0, check_client=check_client)}, monkeypatch)
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

    clock.watch({str(number): Checked(number) for number in checked_at}, monkeypatch)
    moments = sorted(itertools.chain(*checked_at.values()))
    pairs = zip(moments, moments[streams_module.CHECKS_AT_ONCE :], strict=False)
    assert min(after - before for before, after in pairs) > 0.01, "chunks have their turn"
    assert all(max(np.diff(times)) < 1.5 for times in checked_at.values())
