# SPDX-License-Identifier: Apache-2.0
"""LightLLMClient against the fake server: answers, cancellation in each way, deadlines, errors, threads."""

from __future__ import annotations

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightllm_client import (
    Cancelled,
    DeadlineExceeded,
    Generation,
    Internal,
    InvalidArgument,
    LightLLMClient,
    LightLLMError,
    NotFound,
    Unavailable,
)

SENTENCE = "The capital of Japan is Tōkyō 🗼."
SOON = 5.0  # seconds; an upper bound, reached only by a failure


@pytest.fixture
def client(fake_server):
    with LightLLMClient(fake_server.url) as client:
        yield client


def test_generate_returns_the_whole_answer(client, fake_server):
    generation = client.generate("What?", max_tokens=8, return_log_probs=True)
    assert generation == Generation(
        text=SENTENCE,
        token_ids=tuple(range(8)),
        log_probs=(-0.5,) * 8,
        cumulative_logprob=-4.0,
        finish_reason="length",
        num_input_tokens=7,
        num_output_tokens=8,
        num_cached_tokens=2,
    )
    assert fake_server.requests[0].model == "lightllm"
    assert fake_server.requests[0].tensors["stream"] == ("BOOL", [1], [False])


def test_streamed_chunks_join_to_the_unstreamed_answer(client, fake_server):
    chunks = list(client.stream("What?", max_tokens=8, return_log_probs=True))
    assert fake_server.requests[0].tensors["stream"] == ("BOOL", [1], [True])
    assert [chunk.finish_reason for chunk in chunks] == [""] * 7 + ["length"]
    assert [chunk.num_output_tokens for chunk in chunks] == [1] * 8
    assert [chunk.token_ids for chunk in chunks] == [(index,) for index in range(8)]
    assert Generation.join(chunks) == client.generate("What?", max_tokens=8, return_log_probs=True)


def test_a_finished_stream_is_not_cancelled_on_the_server(client, fake_server):
    for _ in client.stream("What?", max_tokens=3):
        pass
    assert fake_server.requests[0].ended.wait(SOON)
    assert not fake_server.requests[0].cancelled.is_set()


def test_the_model_may_have_another_name(fake_server):
    with LightLLMClient(fake_server.url, model="mine") as client:
        client.generate("What?")
    assert fake_server.requests[0].model == "mine"


def test_all_requests_share_one_connection(client, fake_server):
    with client.stream("endless") as first, client.stream("endless") as second:
        next(first)
        next(second)
        client.generate("What?")
    assert len({request.peer for request in fake_server.requests}) == 1
    assert len(fake_server.requests) == 3


def leave_by_close(client):
    stream = client.stream("endless")
    next(stream)
    stream.close()


def leave_by_with(client):
    with client.stream("endless") as stream:
        next(stream)


def leave_by_break(client):
    for _ in client.stream("endless"):
        break
    gc.collect()


def leave_by_error(client):
    with contextlib.suppress(ZeroDivisionError), client.stream("endless") as stream:
        raise ZeroDivisionError(next(stream))


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_with, leave_by_break, leave_by_error])
def test_leaving_a_stream_cancels_it_on_the_server(client, fake_server, leave):
    leave(client)
    assert fake_server.requests[0].cancelled.wait(SOON)


def test_a_closed_stream_has_no_more_chunks(client):
    stream = client.stream("endless")
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


def test_closing_from_another_thread_ends_the_loop(client, fake_server):
    stream = client.stream("endless")
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    assert len(list(stream)) > 0
    timer.join()
    assert fake_server.requests[0].cancelled.wait(SOON)


def test_cancelled_streams_leave_no_threads(client, fake_server):
    with client.stream("endless") as stream:
        next(stream)
    before = threading.active_count()
    for _ in range(10):
        with client.stream("endless") as stream:
            next(stream)
    for request in fake_server.requests:
        assert request.cancelled.wait(SOON)
    # The fake server's own pool may grow to its 16 workers; the threads of streams have names of their own.
    workers = sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())
    assert threading.active_count() - workers <= before


def test_closing_the_client_cancels_its_streams(fake_server):
    client = LightLLMClient(fake_server.url)
    stream = client.stream("endless")
    next(stream)
    client.close()
    with pytest.raises(Cancelled):
        list(stream)
    assert fake_server.requests[0].cancelled.wait(SOON)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_timeout_cancels_and_raises(client, fake_server, streaming):
    call = client.stream if streaming else client.generate
    with pytest.raises(DeadlineExceeded, match=r"DEADLINE_EXCEEDED: the request did not finish within 0\.2 s"):
        list(call("endless", timeout=0.2))
    assert fake_server.requests[0].cancelled.wait(SOON)


def test_the_clients_timeout_holds_unless_the_call_has_its_own(fake_server):
    with LightLLMClient(fake_server.url, timeout=100) as client:
        client.generate("What?")
        client.generate("What?", timeout=30)
    # gRPC rounds up a little on the way.
    assert 90 < fake_server.requests[0].timeout < 105
    assert 20 < fake_server.requests[1].timeout < 35


def test_without_a_timeout_none_is_sent(client, fake_server):
    client.generate("What?")
    timeout = fake_server.requests[0].timeout
    assert timeout is None or timeout > 1e6


def test_an_error_before_the_first_chunk(client):
    with pytest.raises(InvalidArgument) as caught:
        client.generate("error in ensemble 'lightllm', INVALID_ARG: top_p is 1.5; allowed: 0 < top_p ≤ 1")
    assert str(caught.value) == "INVALID_ARG: top_p is 1.5; allowed: 0 < top_p ≤ 1"


def test_an_error_in_mid_stream_keeps_the_text_before_it(client):
    texts = []
    with pytest.raises(Unavailable, match="the engine restarts"):
        texts.extend(chunk.text for chunk in client.stream("late error UNAVAILABLE: the engine restarts"))
    stream = client.stream("late error UNAVAILABLE: the engine restarts")
    assert next(stream).text + next(stream).text == "The capital"
    with pytest.raises(Unavailable):
        next(stream)
    assert list(stream) == []


def test_a_status_without_a_message(client):
    with pytest.raises(NotFound, match="no such model"):
        client.generate("status NOT_FOUND no such model")
    with pytest.raises(LightLLMError, match="UNIMPLEMENTED: not here") as caught:
        client.generate("status UNIMPLEMENTED not here")
    assert type(caught.value) is LightLLMError


def test_a_stream_that_ends_without_an_answer_is_an_error(client):
    with pytest.raises(Internal, match="without a finish reason"):
        client.generate("silent")


def test_no_server_is_unavailable(fake_server):
    fake_server.stop()
    with LightLLMClient(fake_server.url) as client:
        with pytest.raises(Unavailable, match=fake_server.url):
            client.generate("What?")
        with pytest.raises(Unavailable):
            client.health()


def test_a_server_that_goes_away_in_mid_stream_is_an_error(client, fake_server):
    stream = client.stream("endless")
    next(stream)
    fake_server.stop()
    with pytest.raises(LightLLMError):
        list(stream)


def test_health_asks_the_health_model(client, fake_server):
    assert 0 < client.health(timeout=SOON) < SOON
    assert fake_server.requests[0].model == "health"
    assert 0 < fake_server.requests[0].timeout < 2 * SOON


def test_a_server_that_does_not_work_says_why(client, fake_server):
    fake_server.unready = "UNAVAILABLE: generation (process 7) is dead"
    with pytest.raises(Unavailable, match=r"generation \(process 7\) is dead"):
        client.health(timeout=SOON)


def test_many_threads_stream_at_once(client):
    def run(count):
        return "".join(chunk.text for chunk in client.stream("What?", max_tokens=count))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(run, [count % 8 + 1 for count in range(40)]))
    assert texts == [client.generate("What?", max_tokens=count % 8 + 1).text for count in range(40)]


def test_one_streams_end_leaves_the_others_alone(client, fake_server):
    with client.stream("endless") as kept:
        next(kept)
        with client.stream("endless") as closed:
            next(closed)
        assert fake_server.requests[1].cancelled.wait(SOON)
        assert next(kept).finish_reason == ""
        assert not fake_server.requests[0].cancelled.is_set()


def test_several_answers(fake_server):
    with LightLLMClient(fake_server.url) as client:
        first, second = client.generate_several("What?", max_tokens=3, n=2)
        assert first == second
        assert first.token_ids == (0, 1, 2)
        assert [chunk.index for chunk in client.stream("What?", max_tokens=2, n=2)] == [0, 1, 0, 1]
        with pytest.raises(InvalidArgument, match=r"n is 2; allowed: 1, or generate_several"):
            client.generate("What?", n=2)
