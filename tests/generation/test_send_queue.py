# SPDX-License-Identifier: Apache-2.0
"""The send queue: order, how many chunks are on their way, and that nothing keeps a place for ever."""

from __future__ import annotations

import threading
import time

import pytest

from lightllm_backend.generation import send_queue as send_queue_module
from lightllm_backend.generation.send_queue import SendQueue
from tests.polling import poll


class FakeStream:
    def __init__(self, name: str, sent: list[str], awaits_acknowledgement: bool = True) -> None:
        self.name = name
        self.awaits_acknowledgement = awaits_acknowledgement
        self.error: Exception | None = None
        self.coalesces = False
        self.seconds = 0.0
        self._sent = sent

    def send_pending(self) -> bool:
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        self._sent.append(self.name)
        return self.awaits_acknowledgement


@pytest.fixture(autouse=True)
def two_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", 2)


def send_all(send_queue: SendQueue) -> None:
    while send_queue.send_next():
        pass


def test_few_are_on_their_way_and_the_others_go_in_turn() -> None:
    send_queue, sent = SendQueue(num_threads=0), list[str]()
    a, b, c, d = (FakeStream(name, sent) for name in "abcd")
    for stream in (a, b, c, d):
        send_queue.put(stream, urgent=False)
    send_all(send_queue)
    assert sent == ["a", "b"]
    send_queue.acknowledged(b)
    send_queue.put(b, urgent=False)  # it has more to send, after those who wait
    send_all(send_queue)
    assert sent == ["a", "b", "c"]
    for stream in (a, c):
        send_queue.acknowledged(stream)
    send_all(send_queue)
    assert sent == ["a", "b", "c", "d", "b"]


def test_what_is_urgent_waits_for_nobody() -> None:
    send_queue, sent = SendQueue(num_threads=0), list[str]()
    streams = [FakeStream(name, sent) for name in "abc"]
    for stream in streams:
        send_queue.put(stream, urgent=False)
    send_all(send_queue)
    first = FakeStream("first", sent)
    send_queue.put(first, urgent=True)
    send_queue.put(streams[0], urgent=True)
    send_all(send_queue)
    assert sent == ["a", "b", "first", "a"]
    for stream in (streams[0], streams[1]):
        send_queue.acknowledged(stream)
    send_all(send_queue)
    assert sent[4:] == ["c"], "the first one is on its way as well"


def test_a_probe_is_on_its_way_too() -> None:
    send_queue, sent = SendQueue(num_threads=0), list[str]()
    probed = [FakeStream(name, sent) for name in "pq"]
    for stream in probed:
        send_queue.mark_in_flight(stream)
    send_queue.put(FakeStream("a", sent), urgent=False)
    send_all(send_queue)
    assert sent == []
    send_queue.acknowledged(probed[0])
    send_all(send_queue)
    assert sent == ["a"]


def test_who_is_never_acknowledged_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_queue_module, "OVERDUE_SECONDS", 0.2)
    send_queue, sent = SendQueue(num_threads=2), list[str]()
    streams = [FakeStream(name, sent) for name in "abcdef"]
    began = time.monotonic()
    for stream in streams:
        send_queue.put(stream, urgent=False)
    assert poll(lambda: len(sent) == 2)
    send_queue.forget_overdue()
    assert len(sent) == 2

    def all_sent() -> bool:
        send_queue.forget_overdue()  # as the watch over clients does
        return len(sent) == 6

    assert poll(all_sent), "two more each time that two are overdue"
    assert time.monotonic() - began >= 0.4
    for stream in streams:  # a detokenizer that goes on acknowledges them after all
        send_queue.acknowledged(stream)
    assert send_queue._in_flight == {}
    assert not send_queue._ready
    send_queue.close()


def test_those_of_whom_no_awaits_acknowledgement_keep_no_place(caplog: pytest.LogCaptureFixture) -> None:
    send_queue, sent = SendQueue(num_threads=0), list[str]()
    broken = FakeStream("broken", sent)
    broken.error = KeyError("token")
    for stream in (broken, *(FakeStream(name, sent, awaits_acknowledgement=False) for name in "abc")):
        send_queue.put(stream, urgent=False)
    send_all(send_queue)
    assert sent == ["a", "b", "c"]
    assert "a chunk could not be sent" in caplog.text


def test_threads_send_as_soon_as_they_may() -> None:
    before = threading.active_count()
    send_queue, sent = SendQueue(num_threads=3), list[str]()
    streams = [FakeStream(str(number), sent) for number in range(50)]
    for stream in streams:
        send_queue.put(stream, urgent=False)
    assert poll(lambda: len(sent) == 2)
    for stream in streams:
        assert poll(lambda stream=stream: stream.name in sent)
        send_queue.acknowledged(stream)
    send_queue.close()
    assert threading.active_count() == before


def test_what_waits_is_sent_before_it_closes() -> None:
    send_queue, sent = SendQueue(num_threads=1), list[str]()
    for number in range(20):
        send_queue.put(FakeStream(str(number), sent), urgent=True)
    send_queue.close()
    assert len(sent) == 20


def test_a_thread_rests_after_a_chunk_of_several_tokens_but_for_those_who_are_urgent(monkeypatch) -> None:
    monkeypatch.setattr(send_queue_module, "MAX_IN_FLIGHT", 10)
    send_queue, sent = SendQueue(num_threads=1), list[str]()
    slow, other, urgent = (FakeStream(name, sent) for name in ("slow", "other", "urgent"))
    slow.coalesces, slow.seconds = True, 0.5
    send_queue.put(slow, urgent=False)
    send_queue.put(other, urgent=False)
    assert poll(lambda: sent == ["slow"])
    send_queue.put(urgent, urgent=True)
    assert poll(lambda: sent[1:2] == ["urgent"])
    assert poll(lambda: sent[2:] == ["other"])
    send_queue.put(slow, urgent=False)
    assert poll(lambda: sent[3:] == ["slow"])
    send_queue.put(other, urgent=False)
    send_queue.close()
    assert sent[4:] == ["other"]


def test_what_is_sent_again_counts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(send_queue_module.time, "monotonic", lambda: now)
    send_queue, sent = SendQueue(num_threads=0), list[str]()
    a, b, c, d = (FakeStream(name, sent) for name in "abcd")
    send_queue.put(a, urgent=True)
    send_queue.put(b, urgent=True)
    send_all(send_queue)
    now = 0.9
    send_queue.put(a, urgent=True)
    send_queue.put(c, urgent=False)
    send_queue.put(d, urgent=False)
    send_all(send_queue)
    assert sent == ["a", "b", "a"]
    now = 1.5  # b alone is overdue
    send_queue.forget_overdue()
    send_all(send_queue)
    assert sent == ["a", "b", "a", "c"]
