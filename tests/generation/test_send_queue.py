# SPDX-License-Identifier: Apache-2.0
"""The outbox: order, how many chunks are on their way, and that nothing keeps a place for ever."""

from __future__ import annotations

import threading
import time

import pytest

from lightllm_backend.generation import send_queue as outbox_module
from lightllm_backend.generation.send_queue import Outbox
from tests.worker.engine_harness import wait_for


class FakeStream:
    def __init__(self, name: str, sent: list[str], word_will_come: bool = True) -> None:
        self.name = name
        self.word_will_come = word_will_come
        self.error: Exception | None = None
        self.coalesces = False
        self.seconds = 0.0
        self._sent = sent

    def send_pending(self) -> bool:
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        self._sent.append(self.name)
        return self.word_will_come


@pytest.fixture(autouse=True)
def two_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MOST_IN_FLIGHT", 2)


def send_all(outbox: Outbox) -> None:
    while outbox.send_next():
        pass


def test_few_are_on_their_way_and_the_others_go_in_turn() -> None:
    outbox, sent = Outbox(num_threads=0), list[str]()
    a, b, c, d = (FakeStream(name, sent) for name in "abcd")
    for stream in (a, b, c, d):
        outbox.put(stream, urgent=False)
    send_all(outbox)
    assert sent == ["a", "b"]
    outbox.landed(b)
    outbox.put(b, urgent=False)  # it has more to send, after those who wait
    send_all(outbox)
    assert sent == ["a", "b", "c"]
    for stream in (a, c):
        outbox.landed(stream)
    send_all(outbox)
    assert sent == ["a", "b", "c", "d", "b"]


def test_what_is_urgent_waits_for_nobody() -> None:
    outbox, sent = Outbox(num_threads=0), list[str]()
    streams = [FakeStream(name, sent) for name in "abc"]
    for stream in streams:
        outbox.put(stream, urgent=False)
    send_all(outbox)
    first = FakeStream("first", sent)
    outbox.put(first, urgent=True)
    outbox.put(streams[0], urgent=True)
    send_all(outbox)
    assert sent == ["a", "b", "first", "a"]
    for stream in (streams[0], streams[1]):
        outbox.landed(stream)
    send_all(outbox)
    assert sent[4:] == ["c"], "the first one is on its way as well"


def test_a_probe_is_on_its_way_too() -> None:
    outbox, sent = Outbox(num_threads=0), list[str]()
    probed = [FakeStream(name, sent) for name in "pq"]
    for stream in probed:
        outbox.departed(stream)
    outbox.put(FakeStream("a", sent), urgent=False)
    send_all(outbox)
    assert sent == []
    outbox.landed(probed[0])
    send_all(outbox)
    assert sent == ["a"]


def test_those_of_whom_no_word_will_come_keep_no_place(caplog: pytest.LogCaptureFixture) -> None:
    outbox, sent = Outbox(num_threads=0), list[str]()
    broken = FakeStream("broken", sent)
    broken.error = KeyError("token")
    for stream in (broken, *(FakeStream(name, sent, word_will_come=False) for name in "abc")):
        outbox.put(stream, urgent=False)
    send_all(outbox)
    assert sent == ["a", "b", "c"]
    assert "a chunk could not be sent" in caplog.text


def test_threads_send_as_soon_as_they_may() -> None:
    before = threading.active_count()
    outbox, sent = Outbox(num_threads=3), list[str]()
    streams = [FakeStream(str(number), sent) for number in range(50)]
    for stream in streams:
        outbox.put(stream, urgent=False)
    wait_for(lambda: len(sent) == 2)
    for stream in streams:
        wait_for(lambda stream=stream: stream.name in sent)
        outbox.landed(stream)
    outbox.close()
    assert threading.active_count() == before


def test_what_waits_is_sent_before_it_closes() -> None:
    outbox, sent = Outbox(num_threads=1), list[str]()
    for number in range(20):
        outbox.put(FakeStream(str(number), sent), urgent=True)
    outbox.close()
    assert len(sent) == 20


def test_a_thread_rests_after_a_chunk_of_several_tokens_but_for_those_who_are_urgent(monkeypatch) -> None:
    monkeypatch.setattr(outbox_module, "MOST_IN_FLIGHT", 10)
    outbox, sent = Outbox(num_threads=1), list[str]()
    slow, other, urgent = (FakeStream(name, sent) for name in ("slow", "other", "urgent"))
    slow.coalesces, slow.seconds = True, 0.5
    outbox.put(slow, urgent=False)
    outbox.put(other, urgent=False)
    wait_for(lambda: sent == ["slow"])
    rests_since = time.monotonic()
    outbox.put(urgent, urgent=True)
    wait_for(lambda: sent[1:2] == ["urgent"])
    assert time.monotonic() < rests_since + 0.4
    wait_for(lambda: sent[2:] == ["other"])
    assert time.monotonic() > rests_since + 0.4
    outbox.put(slow, urgent=False)
    wait_for(lambda: sent[3:] == ["slow"])
    outbox.put(other, urgent=False)
    outbox.close()
    assert sent[4:] == ["other"]
