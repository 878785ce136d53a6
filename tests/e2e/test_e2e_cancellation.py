# SPDX-License-Identifier: Apache-2.0
"""Clients that go away and deadlines that pass: whatever state a request is in, what it holds is given back."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from lightllm_client import AsyncLightLLMClient, ChunkStream, DeadlineExceeded, LightLLMClient, Unavailable
from tests.e2e.calls import NO_PROXY, GenerateStream, generate, infer_grpc, infer_http, stream_grpc, tensors
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROMPT = "Once upon a time, there was a"
LONG = {"max_tokens": 4000, "ignore_eos": True}  # for minutes
RUNNING, WAITING = 4, 8  # as small_server is set up
CLIENT = Path(__file__).parents[2] / "client"
HALF_A_SECOND = 500_000  # microseconds
EVENTUALLY = 60.0
Start = Callable[[int, int], list[ChunkStream]]


@pytest.fixture(autouse=True)
def idle_before(small_server: TritonServer) -> None:
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


@pytest.fixture
def start(small_server: TritonServer, small_client: LightLLMClient) -> Iterator[Start]:
    """Opens so many long streams, and waits until so many of all are waiting; closes them in the end."""
    opened: list[ChunkStream] = []

    def start(count: int, waiting: int) -> list[ChunkStream]:
        streams = [small_client.stream(PROMPT, **LONG) for _ in range(count)]
        opened.extend(streams)
        assert poll(is_running(small_server, RUNNING, waiting), EVENTUALLY), small_server.metrics()
        return streams

    yield start
    for stream in opened:
        stream.close()


def is_running(server: TritonServer, running: int, queued: int) -> Callable[[], bool]:
    def holds() -> bool:
        now = server.metrics()
        return (now["lightllm_running_requests"], now["lightllm_queued_requests"]) == (running, queued)

    return holds


def grpc_client(server: TritonServer) -> Any:
    return tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY)


def cancelled_count(server: TritonServer) -> float:
    return server.metrics()['lightllm_requests_total{status="cancelled"}']


def test_streams_of_which_half_wait(small_server: TritonServer, start: Start) -> None:
    before = cancelled_count(small_server)
    streams = start(RUNNING, 0) + start(RUNNING, RUNNING)
    next(streams[0])
    for stream in streams:
        stream.close()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()
    assert poll(lambda: cancelled_count(small_server) == before + 2 * RUNNING, EVENTUALLY)


def test_only_those_that_wait(small_server: TritonServer, small_client: LightLLMClient, start: Start) -> None:
    streams, waiting = start(RUNNING, 0), start(WAITING, WAITING)
    with pytest.raises(Unavailable, match=r"the queue is full \(8 requests\)"):
        small_client.generate(PROMPT, max_tokens=1)
    for stream in waiting:
        stream.close()
    assert poll(is_running(small_server, RUNNING, 0), EVENTUALLY), small_server.metrics()
    assert next(streams[0]).num_output_tokens, "those that ran go on"
    for stream in streams:
        stream.close()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_asynchronous_streams_and_answers(small_server: TritonServer) -> None:
    before = cancelled_count(small_server)

    async def leave_the_loop(client: AsyncLightLLMClient) -> None:
        async for _ in client.stream(PROMPT, **LONG):
            break

    async def leave_all() -> None:
        async with AsyncLightLLMClient(small_server.grpc_url, max_retries=0) as client:
            # One answer leaves slots for the streams, which need a first token; the later answers run or wait.
            answers = [asyncio.create_task(client.generate(PROMPT, **LONG))]
            await asyncio.gather(*(leave_the_loop(client) for _ in range(RUNNING - 1)))
            answers += [asyncio.create_task(client.generate(PROMPT, **LONG)) for _ in range(RUNNING)]
            assert await asyncio.to_thread(poll, is_running(small_server, RUNNING, 1), EVENTUALLY)
            for answer in answers:
                answer.cancel()
            await asyncio.wait(answers)
            assert all(answer.cancelled() for answer in answers)
            idle = await asyncio.to_thread(poll, small_server.is_idle, EVENTUALLY)
            assert idle, small_server.metrics()

    asyncio.run(leave_all())
    assert poll(lambda: cancelled_count(small_server) == before + 2 * RUNNING, EVENTUALLY)


def test_requests_that_do_not_stream(small_server: TritonServer) -> None:
    """Of the ensemble, running and waiting: they have no chunk on which the news could come."""
    values = tensors(tritonclient.grpc, {"text_input": PROMPT, **LONG})
    with ExitStack() as stack:
        for _ in range(RUNNING + 2):
            client = stack.enter_context(grpc_client(small_server))
            stack.callback(client.stop_stream, cancel_requests=True)
            client.start_stream(callback=lambda result, error: None)
            client.async_stream_infer("lightllm", values)
        assert poll(is_running(small_server, RUNNING, 2), EVENTUALLY), small_server.metrics()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_unary_calls(small_server: TritonServer) -> None:
    with grpc_client(small_server) as client:
        values = tensors(tritonclient.grpc, {"text_input": PROMPT, **LONG})
        ended: queue.Queue[Any] = queue.Queue()
        calls = [
            client.async_infer("lightllm_unary", values, callback=lambda result, error: ended.put(error))
            for _ in range(RUNNING + 1)
        ]
        assert poll(is_running(small_server, RUNNING, 1), EVENTUALLY), small_server.metrics()
        for call in calls:
            call.cancel()
        assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()
        assert all("CANCELLED" in str(ended.get(timeout=EVENTUALLY)) for _ in calls)


def test_during_a_long_prefill(small_server: TritonServer, small_client: LightLLMClient) -> None:
    computed = small_server.metrics()["lightllm_prompt_tokens_total"]
    stream = small_client.stream("word " * 8000, max_tokens=16)  # 250 steps
    assert poll(is_running(small_server, 1, 0), EVENTUALLY), small_server.metrics()
    stream.close()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()
    assert small_server.metrics()["lightllm_prompt_tokens_total"] - computed < 8000, "not all of the prompt"


def test_a_channel_that_is_closed_under_its_streams(small_server: TritonServer) -> None:
    client = LightLLMClient(small_server.grpc_url, timeout=120, max_retries=0)
    streams = [client.stream(PROMPT, **LONG) for _ in range(RUNNING + 2)]
    assert next(streams[0]).num_output_tokens
    assert poll(is_running(small_server, RUNNING, 2), EVENTUALLY), small_server.metrics()
    client.close()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


DOOMED_PROCESS = f"""
import sys, time
from lightllm_client import LightLLMClient
client = LightLLMClient(sys.argv[1], max_retries=0)
streams = [client.stream({PROMPT!r}, max_tokens=4000, ignore_eos=True) for _ in range({RUNNING + 2})]
time.sleep(600)
"""


def test_a_client_process_that_is_killed(small_server: TritonServer) -> None:
    command = [sys.executable, "-c", DOOMED_PROCESS, small_server.grpc_url]
    environment = os.environ | {"PYTHONPATH": str(CLIENT)}
    with subprocess.Popen(command, env=environment) as process:
        try:
            assert poll(is_running(small_server, RUNNING, 2), EVENTUALLY), small_server.metrics()
        finally:
            process.kill()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_dropped_http_stream(small_server: TritonServer) -> None:
    streams = [GenerateStream(small_server, {"text_input": PROMPT, "stream": True, **LONG}) for _ in range(2)]
    for stream in streams:
        assert next(stream)["num_output_tokens"]
    for stream in streams:
        stream.drop()
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_a_client_that_reads_nothing_holds_nobody_up(small_server: TritonServer, small_client: LightLLMClient) -> None:
    idle_reader = GenerateStream(small_server, {"text_input": PROMPT, "stream": True, **LONG})
    try:
        assert small_client.generate(PROMPT, max_tokens=4).num_output_tokens == 4
    finally:
        idle_reader.drop()


# Deadlines


def test_timeout_of_our_client(small_server: TritonServer, small_client: LightLLMClient) -> None:
    with pytest.raises(DeadlineExceeded, match="did not finish within 0.5 s"):
        small_client.generate(PROMPT, timeout=0.5, **LONG)
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


@pytest.mark.parametrize("infer", [infer_http, infer_grpc])
def test_deadline_of_a_unary_call(small_server: TritonServer, infer: Callable[..., Any]) -> None:
    with pytest.raises(InferenceServerException, match="CANCELLED: the request's deadline has passed"):
        infer(small_server, {"text_input": PROMPT, **LONG}, timeout=HALF_A_SECOND)
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_deadline_of_a_grpc_stream(small_server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="CANCELLED: the request's deadline has passed"):
        stream_grpc(small_server, {"text_input": PROMPT, "stream": True, **LONG}, timeout=HALF_A_SECOND)
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


@pytest.mark.parametrize("model", ["lightllm", "lightllm_unary"])
def test_deadline_of_http_generate(small_server: TritonServer, model: str) -> None:
    body = {"text_input": PROMPT, **LONG, "parameters": {"timeout": HALF_A_SECOND}}
    status, answer = generate(small_server, body, model)
    assert status == 400
    assert "CANCELLED: the request's deadline has passed" in answer["error"]
    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()


def test_deadline_of_http_generate_stream_keeps_the_text(small_server: TritonServer) -> None:
    body = {"text_input": PROMPT, "stream": True, **LONG, "timeout": 4 * HALF_A_SECOND}
    events = list(GenerateStream(small_server, body))
    assert "".join(event.get("text_output", "") for event in events)
    assert "CANCELLED: the request's deadline has passed" in events[-1]["error"]


def test_deadline_while_waiting(small_server: TritonServer, start: Start) -> None:
    start(RUNNING, 0)
    with pytest.raises(InferenceServerException, match="CANCELLED: the request's deadline has passed"):
        infer_grpc(small_server, {"text_input": PROMPT}, timeout=HALF_A_SECOND)


def test_impossible_timeout(small_server: TritonServer) -> None:
    status, answer = generate(small_server, {"text_input": PROMPT, "timeout": -1})
    assert status == 400
    assert "INVALID_ARG: timeout is -1; allowed: an integer ≥ 0, of microseconds" in answer["error"]
