# SPDX-License-Identifier: Apache-2.0
"""AsyncLightLLMClient against the fake server: answers, cancellation in each way, deadlines, errors, many at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading

import pytest

from lightllm_client import (
    AsyncLightLLMClient,
    Cancelled,
    DeadlineExceeded,
    Generation,
    Internal,
    InvalidArgument,
    LightLLMClient,
    NotFound,
    Unavailable,
)
from tests.polling import poll

SOON = 60.0  # seconds; an upper bound, reached only by a failure


@pytest.fixture
def run(fake_server):
    """Runs a coroutine function of a client in an event loop of its own."""

    def run(function, **options):
        async def with_client():
            async with AsyncLightLLMClient(fake_server.url, **options) as client:
                return await asyncio.wait_for(function(client), SOON)

        return asyncio.run(with_client())

    return run


def test_its_methods_and_their_parameters_are_those_of_the_synchronous_client():
    for name in ("__init__", "generate", "stream", "health"):
        ours, theirs = getattr(AsyncLightLLMClient, name), getattr(LightLLMClient, name)
        assert {**ours.__annotations__, "return": None} == {**theirs.__annotations__, "return": None}
        assert (ours.__defaults__, ours.__kwdefaults__) == (theirs.__defaults__, theirs.__kwdefaults__)


def test_answers_are_those_of_the_synchronous_client(run, fake_server):
    async def ask(client):
        chunks = [chunk async for chunk in client.stream("What?", max_tokens=8, return_log_probs=True)]
        return chunks, await client.generate("What?", max_tokens=8, return_log_probs=True)

    chunks, generation = run(ask)
    assert [request.tensors["stream"] for request in fake_server.requests] == [
        ("BOOL", [1], [True]),
        ("BOOL", [1], [False]),
    ]
    with LightLLMClient(fake_server.url) as client:
        assert generation == client.generate("What?", max_tokens=8, return_log_probs=True)
    assert [chunk.finish_reason for chunk in chunks] == [""] * 7 + ["length"]
    assert Generation.join(chunks) == generation


def test_model_and_timeout_are_sent(run, fake_server):
    async def ask(client):
        await client.generate("What?")
        await client.generate("What?", timeout=30)

    run(ask, model="mine", timeout=100)
    assert [request.model for request in fake_server.requests] == ["mine"] * 2
    assert 90 < fake_server.requests[0].timeout < 105
    assert 20 < fake_server.requests[1].timeout < 35


def test_a_client_may_be_made_before_the_event_loop_runs(fake_server):
    client = AsyncLightLLMClient(fake_server.url)

    async def ask():
        async with client:
            return await client.generate("What?", max_tokens=2)

    assert asyncio.run(ask()).text == "The capital"


def test_many_requests_run_at_once_on_one_connection(run, fake_server):
    async def ask(client):
        streams = [client.stream("endless") for _ in range(12)]
        for stream in streams:
            await anext(stream)
        assert not any(request.ended.is_set() for request in fake_server.requests)
        for stream in streams:
            await stream.aclose()
        return await asyncio.gather(*(client.generate("What?", max_tokens=count % 8 + 1) for count in range(100)))

    answers = run(ask)
    assert [answer.num_output_tokens for answer in answers] == [count % 8 + 1 for count in range(100)]
    assert len({request.peer for request in fake_server.requests}) == 1
    assert len(fake_server.requests) == 112


def test_it_needs_no_thread_for_each_stream(run):
    async def ask(client):
        first = client.stream("endless")
        await anext(first)
        before = names()
        streams = [client.stream("endless") for _ in range(10)]
        for stream in streams:
            await anext(stream)
        return names() - before

    def names():
        # The fake server's own workers are in the same process.
        return {thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" not in thread.name}

    assert run(ask) == set()


async def leave_by_close(client, server):
    stream = client.stream("endless")
    await anext(stream)
    await stream.aclose()


async def leave_by_with(client, server):
    async with client.stream("endless") as stream:
        await anext(stream)


async def leave_by_break(client, server):
    async for _ in client.stream("endless"):
        break
    gc.collect()


async def leave_by_error(client, server):
    with contextlib.suppress(ZeroDivisionError):
        async with client.stream("endless") as stream:
            raise ZeroDivisionError(await anext(stream))


async def leave_by_cancelling_the_task(client, server):
    async def read():
        async for _ in client.stream("endless"):
            pass

    await end_by_cancelling(asyncio.create_task(read()), server)


async def leave_by_cancelling_generate(client, server):
    await end_by_cancelling(asyncio.create_task(client.generate("endless")), server)


async def has_come(server):
    """Wait until the server has a request."""
    assert await asyncio.to_thread(poll, lambda: server.requests)


async def end_by_cancelling(task, server):
    await has_come(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def leave_by_timeout_of_asyncio(client, server):
    task = asyncio.create_task(client.generate("endless"))
    await has_come(server)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(task, 0.01)


async def leave_in_another_thread(client, server):
    stream = client.stream("endless")
    await anext(stream)
    streams = [stream]
    del stream
    thread = threading.Thread(target=streams.clear)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_close, leave_by_with, leave_by_break, leave_by_error, leave_by_cancelling_the_task,
        leave_by_cancelling_generate, leave_by_timeout_of_asyncio, leave_in_another_thread,
    ],
)  # fmt: skip
def test_leaving_a_stream_cancels_it_on_the_server(run, fake_server, leave):
    async def ask(client):
        await leave(client, fake_server)
        return await asyncio.to_thread(fake_server.requests[0].cancelled.wait, SOON)

    assert run(ask)


def test_a_closed_stream_has_no_more_chunks(run):
    async def ask(client):
        stream = client.stream("endless")
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        return [chunk async for chunk in stream]

    assert run(ask) == []


def test_closing_from_another_task_ends_the_loop(run, fake_server):
    async def ask(client):
        stream = client.stream("endless")
        has_begun = asyncio.Event()

        async def close():
            await has_begun.wait()
            await stream.aclose()

        closing = asyncio.create_task(close())
        async for _ in stream:
            has_begun.set()
        await closing
        return await asyncio.to_thread(fake_server.requests[0].cancelled.wait, SOON)

    assert run(ask)


def test_closing_the_client_cancels_its_streams(run, fake_server):
    async def ask(client):
        stream = client.stream("endless")
        reading = asyncio.create_task(client.generate("endless"))
        await anext(stream)
        await client.aclose()
        for waiting in (anext(stream), reading):
            with pytest.raises(Cancelled, match="the client was closed"):
                while True:
                    await waiting
        for request in fake_server.requests:
            assert await asyncio.to_thread(request.cancelled.wait, SOON)

    run(ask)


@pytest.mark.parametrize("leave_early", [False, True])
def test_a_finished_stream_is_not_cancelled_on_the_server(run, fake_server, leave_early):
    async def ask(client):
        async for chunk in client.stream("What?", max_tokens=3):
            if leave_early and chunk.finish_reason:
                break
        assert await asyncio.to_thread(fake_server.requests[0].ended.wait, SOON)

    run(ask)
    assert not fake_server.requests[0].cancelled.is_set()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_timeout_cancels_and_raises(run, fake_server, streaming):
    async def ask(client):
        if streaming:
            return [chunk async for chunk in client.stream("endless", timeout=0.2)]
        return await client.generate("endless", timeout=0.2)

    with pytest.raises(DeadlineExceeded, match=r"the request did not finish within 0\.2 s"):
        run(ask)
    assert fake_server.requests[0].cancelled.wait(SOON)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("error INVALID_ARG: top_p is 1.5", InvalidArgument, "INVALID_ARG: top_p is 1.5"),
        ("late error UNAVAILABLE: the engine restarts", Unavailable, "the engine restarts"),
        ("status NOT_FOUND no such model", NotFound, "no such model"),
        ("silent", Internal, "without a finish reason"),
    ],
)
def test_errors_are_those_of_the_synchronous_client(run, prompt, error, message):
    with pytest.raises(error, match=message):
        run(lambda client: client.generate(prompt))


def test_an_error_in_mid_stream_keeps_the_text_before_it(run):
    async def ask(client):
        stream = client.stream("late error UNAVAILABLE: the engine restarts")
        texts = [(await anext(stream)).text, (await anext(stream)).text]
        with pytest.raises(Unavailable):
            await anext(stream)
        return texts, [chunk async for chunk in stream]

    assert run(ask) == (["The", " capital"], [])


def test_a_wrong_option_is_refused_before_it_is_sent(run, fake_server):
    with pytest.raises(InvalidArgument, match="max_tokens is '12'"):
        run(lambda client: client.generate("What?", max_tokens="12"))
    assert fake_server.requests == []


def test_no_server_is_unavailable(run, fake_server):
    fake_server.stop()
    for ask in (lambda client: client.generate("What?"), lambda client: client.health()):
        with pytest.raises(Unavailable, match=fake_server.url):
            run(ask)


def test_health_asks_the_health_model(run, fake_server):
    assert 0 < run(lambda client: client.health(timeout=SOON)) < SOON
    assert fake_server.requests[0].model == "health"
    fake_server.unready = "UNAVAILABLE: generation (process 7) is dead"
    with pytest.raises(Unavailable, match=r"generation \(process 7\) is dead"):
        run(lambda client: client.health())


def test_outside_an_event_loop_a_stream_is_refused_at_once(fake_server):
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncLightLLMClient(fake_server.url).stream("What?")
