# SPDX-License-Identifier: Apache-2.0
"""A request that got nothing is sent again: when, how often, and by both clients alike."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from lightllm_client import AsyncLightLLMClient, InvalidArgument, LightLLMClient, LightLLMError, Unavailable, retries
from lightllm_client.retries import Retries
from tests.polling import poll

BUSY = Unavailable("the queue is full")
SOON = 60.0  # seconds; an upper bound, reached only by a failure


def pauses(max_retries, timeout=None, error=BUSY):
    """The pauses of a request that always fails, each of which takes its time on a clock of its own."""
    now = [0.0]
    one = Retries(max_retries, timeout, clock=lambda: now[0], draw=lambda: 0.0)
    taken = []
    while (pause := one.pause_after(error)) is not None:
        taken.append(pause)
        now[0] += pause
    return taken


def test_pauses_double_up_to_a_limit():
    assert pauses(7) == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_pause_is_shortened_by_chance():
    assert Retries(1, None, draw=lambda: 1.0).pause_after(BUSY) == 0.5 * 0.75


def test_all_attempts_share_the_timeout():
    assert pauses(7, timeout=2.0) == [0.5, 1.0]
    now = [10.0]
    one = Retries(1, 5.0, clock=lambda: now[0])
    now[0] = 12.0
    assert one.seconds_left() == 3.0


@pytest.mark.parametrize("error", [InvalidArgument("no"), LightLLMError("what?")])
def test_other_errors_are_final(error):
    assert pauses(7, error=error) == []


@pytest.fixture(params=["synchronous", "asynchronous"])
def ask(request, fake_server, monkeypatch):
    """Asks for a stream of three words, with pauses of almost nothing; returns the words."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)

    def synchronous(prompt, **options):
        with LightLLMClient(fake_server.url, **options) as client:
            return [chunk.text for chunk in client.stream(prompt, max_tokens=3)]

    async def asynchronous(prompt, **options):
        async with AsyncLightLLMClient(fake_server.url, **options) as client:
            return [chunk.text async for chunk in client.stream(prompt, max_tokens=3)]

    if request.param == "synchronous":
        return synchronous
    return lambda prompt, **options: asyncio.run(asynchronous(prompt, **options))


def test_a_request_that_got_nothing_is_sent_again(ask, fake_server):
    assert ask("busy 2") == ["The", " capital", " of"]
    assert len(fake_server.requests) == 3


def test_it_is_sent_again_as_often_as_the_client_says(ask, fake_server):
    with pytest.raises(Unavailable, match="the queue is full"):
        ask("busy 9")
    assert len(fake_server.requests) == 3
    with pytest.raises(Unavailable, match="the queue is full"):
        ask("busy 9", max_retries=0)
    assert len(fake_server.requests) == 4


def test_an_answer_that_has_begun_is_not_asked_for_again(ask, fake_server):
    with pytest.raises(Unavailable, match="the engine restarts"):
        ask("late error UNAVAILABLE: the engine restarts")
    assert len(fake_server.requests) == 1


def test_a_connection_that_fails_is_tried_again(ask, fake_server, caplog):
    fake_server.stop()
    with caplog.at_level("INFO", logger="lightllm_client"), pytest.raises(Unavailable):
        ask("What?")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_a_wrong_number_is_refused(wrong):
    with pytest.raises(InvalidArgument, match=f"max_retries is {wrong}; allowed: a whole number ≥ 0"):
        LightLLMClient(max_retries=wrong)


def test_closing_ends_the_pause(fake_server, monkeypatch, caplog):
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 10 * SOON)
    caplog.set_level(logging.INFO, "lightllm_client")
    with LightLLMClient(fake_server.url) as client:
        stream = client.stream("busy 9")
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(stream))
        reader.start()
        assert poll(lambda: "a request is sent again" in caplog.text)
        stream.close()
        reader.join(SOON)
        assert not reader.is_alive()
        assert seen == []


def test_closing_or_cancelling_ends_the_pause_of_the_asynchronous_client(fake_server, monkeypatch, caplog):
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 10 * SOON)
    caplog.set_level(logging.INFO, "lightllm_client")

    async def run():
        async with AsyncLightLLMClient(fake_server.url) as client:
            closed, cancelled, abandoned = (client.stream("busy 9") for _ in range(3))
            tasks = [asyncio.ensure_future(anext(stream)) for stream in (closed, cancelled, abandoned)]
            assert await asyncio.to_thread(poll, lambda: caplog.text.count("a request is sent again") == 3)
            await closed.aclose()
            tasks[1].cancel()
            await client.aclose()
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SOON)

    kinds = [type(one).__name__ for one in asyncio.run(run())]
    assert kinds == ["StopAsyncIteration", "CancelledError", "Cancelled"]


def test_the_prefix_key_travels_as_a_digest(fake_server):
    with LightLLMClient(fake_server.url) as client:
        for key in ("Sitzung 7 🗼", "Sitzung 7 🗼", "another", None):
            client.generate("What?", prefix_key=key)
    keys = [request.metadata.get("x-prefix-key") for request in fake_server.requests]
    assert keys[0] == keys[1]
    assert len({*keys}) == 3
    assert keys[3] is None
