# SPDX-License-Identifier: Apache-2.0
"""The load generator against a stand-in for the server that answers as it is told."""

import asyncio
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from perf.front_throughput import fronted
from perf.serving.calls import OpenAICaller, Part, Target, chunk_from_json, events_of
from perf.serving.load import Planned, run_load
from perf.serving.measure import RequestFailed
from perf.serving.systems import SystemFailed, free_ports, wait_ready
from perf.serving.workload import Length, WorkItem

ITEM = WorkItem((5, 6, 7, 8), Length(4, 6))
Answer = Callable[[int, int], Iterator[object]]


def response(prompt_tokens: int, tokens: int, finish_reason: str, is_last: bool = True) -> object:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.model_name = "lightllm"
    message.infer_response.parameters["triton_final_response"].bool_param = is_last

    def add(name: str, datatype: str, shape: int, content: bytes) -> None:
        message.infer_response.outputs.add(name=name, datatype=datatype, shape=[shape])
        message.infer_response.raw_output_contents.append(content)

    def string(text: str) -> bytes:
        return struct.pack("<I", len(text)) + text.encode()

    add("text_output", "BYTES", 1, string("x"))
    add("finish_reason", "BYTES", 1, string(finish_reason))
    add("num_input_tokens", "INT32", 1, struct.pack("<i", prompt_tokens))
    add("num_output_tokens", "INT32", 1, struct.pack("<i", tokens))
    add("output_ids", "INT32", tokens, struct.pack(f"<{tokens}i", *range(tokens)))
    add("output_log_probs", "FP32", 0, b"")
    add("cumulative_logprob", "FP32", 1, struct.pack("<f", 0.0))
    return message


def honest(prompt_tokens: int, wanted: int) -> Iterator[object]:
    is_last = wanted == 2
    yield response(prompt_tokens, 2, "length" if is_last else "", is_last)
    if not is_last:
        time.sleep(0.02)
        yield response(prompt_tokens, wanted - 2, "length")


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers the first call of a client honestly and the requests as `answer` has it."""

    def __init__(self) -> None:
        self.answer: Answer = honest
        self.running = self.most_running = self.streams = 0

    def ModelStreamInfer(self, request_iterator: Iterator[object], _: object) -> Iterator[object]:  # noqa: N802
        self.streams += 1
        for request in request_iterator:
            contents = {i.name: content for i, content in zip(request.inputs, request.raw_input_contents, strict=True)}
            prompt_tokens, [wanted] = len(contents["input_ids"]) // 4, struct.unpack("<i", contents["max_tokens"])
            assert contents["ignore_eos"] == contents["stream"] == b"\1"
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            yield from (honest if prompt_tokens == 3 else self.answer)(prompt_tokens, wanted)
            self.running -= 1


@pytest.fixture
def server() -> Iterator[tuple[Servicer, Target]]:
    servicer = Servicer()
    server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, Target("grpc", f"127.0.0.1:{port}")
    server.stop(None)


def plan(count: int, gap: float = 0.0) -> list[Planned]:
    return [Planned(index, gap * index, ITEM) for index in range(count)]


def test_two_processes_send_when_it_is_time_and_see_everything(server: tuple[Servicer, Target]) -> None:
    _, target = server
    progress: list[int] = []
    started, traces, shares = run_load(target, plan(10, gap=0.1), 2, None, progress.append)
    assert [trace.index for trace in traces] == list(range(10))
    assert all(trace.tokens == [2, 4] and trace.prompt_tokens == 4 for trace in traces)
    for trace in traces:
        assert 0.0 <= trace.sent - started - 0.1 * trace.index < 20.0
    # On a busy machine some responses are read together.
    assert 0.01 < max(trace.arrivals[1] - trace.arrivals[0] for trace in traces) < 20.0
    assert len(shares) == 2
    assert all(0 < share.cpu_share < 1.5 and share.loop_lag_p99 > 0 for share in shares)
    assert sum(progress) == 10
    assert len(progress) > 2


def test_no_more_than_the_concurrency_run_at_once(server: tuple[Servicer, Target]) -> None:
    servicer, target = server
    _, traces, _ = run_load(target, plan(9), 1, 3, lambda count: None)
    assert len(traces) == 9
    assert servicer.most_running == servicer.streams == 3


def short(prompt_tokens: int, wanted: int) -> Iterator[object]:
    yield response(prompt_tokens, wanted - 1, "length")


def error(prompt_tokens: int, wanted: int) -> Iterator[object]:
    yield response(prompt_tokens, 1, "", is_last=False)
    yield service_pb2.ModelStreamInferResponse(error_message="in ensemble 'lightllm', UNAVAILABLE: the queue is full")


def broken(prompt_tokens: int, wanted: int) -> Iterator[object]:
    yield response(prompt_tokens, 1, "")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (short, r"request \d \(4 prompt tokens, 6 wanted\): 5 tokens came"),
        (error, r"request \d \(4 prompt tokens, 6 wanted\), after 1 tokens: UNAVAILABLE: the queue is full"),
        (broken, r"request \d \(4 prompt tokens, 6 wanted\): 1 tokens came; finish_reason is ''"),
    ],
)
def test_the_first_wrong_answer_ends_it_all(server: tuple[Servicer, Target], answer: Answer, message: str) -> None:
    servicer, target = server
    servicer.answer = answer
    begun = time.monotonic()
    with pytest.raises(RequestFailed, match=message):
        run_load(target, plan(4, gap=30.0), 1, None, lambda count: None)
    assert time.monotonic() - begun < 25


def late(prompt_tokens: int, wanted: int) -> Iterator[object]:
    time.sleep(4)
    yield response(prompt_tokens, wanted, "length")


def test_no_request_takes_longer_than_the_timeout(server: tuple[Servicer, Target]) -> None:
    servicer, target = server
    servicer.answer = late
    with pytest.raises(RequestFailed, match=r"request 0 .*, after 0 tokens: no answer within 2 s"):
        run_load(replace(target, timeout=2.0), plan(1), 1, None, lambda count: None)


def test_no_server_is_an_error_of_the_first_call() -> None:
    with pytest.raises(RequestFailed, match="the first call .*UNAVAILABLE"):
        run_load(Target("grpc", "127.0.0.1:9"), plan(1), 1, None, lambda count: None)


def test_one_token_comes_from_http_without_its_list() -> None:
    text = (
        b'{"text_output":"x","output_ids":19,"output_log_probs":[],"cumulative_logprob":0.0,'
        b'"finish_reason":"","num_input_tokens":5,"num_output_tokens":1}'
    )
    assert chunk_from_json(text).token_ids == (19,)
    with pytest.raises(RequestFailed, match="no JSON"):
        chunk_from_json(b"oops")


def test_the_front_is_asked_by_openais_api() -> None:
    with fronted() as (_, port, _):
        target = Target("openai", f"127.0.0.1:{port}")
        _, traces, _ = run_load(target, plan(5), 2, None, lambda count: None)
        assert [trace.index for trace in traces] == list(range(5))
        assert all(trace.tokens == [1] * 6 and trace.prompt_tokens == 4 for trace in traces)
        _, traces, _ = run_load(replace(target, streaming=False), plan(2), 1, None, lambda count: None)
        assert all(trace.tokens == [6] for trace in traces)
        long = Planned(0, 0.0, WorkItem((-1,), Length(1, 6)))
        with pytest.raises(RequestFailed, match=r"request 0 .*: status 400: .*prompt"):
            run_load(target, [long], 1, None, lambda count: None)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"", "no answer within 1 s"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", "has closed the connection"),
        (b"SMTP\r\n\r\n", "is no HTTP"),
    ],
)
def test_an_http_answer_that_is_not_whole_is_refused(answer: bytes, fault: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(answer)
        if not answer:
            await reader.read()  # the client's end
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with OpenAICaller(Target("openai", f"127.0.0.1:{port}", timeout=1.0)) as caller:
                with pytest.raises(RequestFailed, match=fault):
                    [part async for part in caller.ask(b"{}")]

    asyncio.run(asyncio.wait_for(ask(), 60))


EVENT = b'data: {"choices": [%s], "usage": {"prompt_tokens": 4, "completion_tokens": %d}}\n\n'
MIDDLE, LAST = b'{"finish_reason": null}', b'{"finish_reason": "length"}'


def parts_of(*pieces: bytes) -> list[Part]:
    async def pieces_of() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def collect() -> list[Part]:
        return [part async for part in OpenAICaller(Target("openai", "")).parts(events_of(pieces_of()))]

    return asyncio.run(collect())


def test_events_may_come_together_or_cut() -> None:
    stream = EVENT % (MIDDLE, 1) + EVENT % (LAST, 6) + EVENT % (b"", 6) + b"data: [DONE]\n\n"
    assert parts_of(stream[:30], stream[30:]) == [Part(4, 1, ""), Part(4, 5, "length")]


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (EVENT % (MIDDLE, 1), "ended without"),
        (EVENT % (LAST, 1) + EVENT % (b"", 3), "2 tokens more"),
        (b'data: {"choices": [], "usage": null}\n\n', "no usage"),
        (b'data: {"error": {"message": "the queue is full"}}\n\n', "the queue is full"),
    ],
)
def test_a_stream_that_is_not_whole_is_refused(stream: bytes, fault: str) -> None:
    with pytest.raises(RequestFailed, match=fault):
        parts_of(stream)


def test_a_server_that_logs_an_error_while_it_starts_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    log.write_text("2026-01-01 00:00:00 error: a process of the front has ended, with exit code 1\n")
    [port] = free_ports(1)
    with subprocess.Popen(["sleep", "600"]) as process:
        with pytest.raises(SystemFailed, match="a process of the front has ended"):
            wait_ready(process, {port: "/health"}, log)
        process.kill()
