# SPDX-License-Identifier: Apache-2.0
"""What a process of the front costs: CPU time a response and its parts, open streams, and readers that do not read.

    python -m perf.front_throughput

A real process of the front (lightllm_backend/front/main.py) calls a pretended Triton server in a process of its own,
which answers at any pace. All figures but the throughput are CPU seconds of the front's process, so that the clients,
the pretended server and whatever else the machine does count little.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import grpc  # type: ignore[import-untyped]
import psutil
from tritonclient.grpc import service_pb2

from lightllm_backend.config import EngineConfig
from lightllm_backend.file_limit import raise_file_limit
from lightllm_backend.front.chat.deltas import PlainText
from lightllm_backend.front.openai.events import Events, choice_json, text_json
from lightllm_backend.front.openai.generate import Job, Usage
from lightllm_backend.front.openai.schema import CompletionRequest
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.launch.fronts import COMMAND, front_environment, listening_socket
from lightllm_backend.triton_server.tensors import PUBLIC_OUTPUTS
from lightllm_client import AsyncLightLLMClient
from lightllm_client.tensors import chunk_from_response
from perf.record import RESULTS, circumstances, write_result
from perf.serving.systems import answers, free_ports

START_SECONDS = 120.0
IDLE_SHARE, IDLE_SECONDS = 0.05, 3.0  # of a core, over so long: a process that waits
PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "httptools", "grpcio")
DONE = b"data: [DONE]\n\n"
WORD = " token"
MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]
# The ways in: path, body, and what ends an answer.
WAYS: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "completions, stream": ("/v1/completions", {"prompt": "Once upon a time", "stream": True}, DONE),
    "chat, stream": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, DONE),
    "completions, whole": ("/v1/completions", {"prompt": "Once upon a time"}, b"}}}"),
    "LightLLM, stream": ("/generate_stream", {"inputs": "Once upon a time", "parameters": {}}, b'"length"'),
}


# The pretended server


@functools.cache
def response(text: str, finish_reason: str, prompt_tokens: int = 1) -> bytes:
    """A response of the ensemble with one token, as the bytes of a gRPC message."""
    given: dict[str, tuple[str, bytes]] = {
        "text_output": ("BYTES", struct.pack("<I", len(text)) + text.encode()),
        "finish_reason": ("BYTES", struct.pack("<I", len(finish_reason)) + finish_reason.encode()),
        "logprobs": ("BYTES", struct.pack("<I", 4) + b"null"),
        "cumulative_logprob": ("FP32", struct.pack("<f", 0.0)),
    }
    for name in ("num_input_tokens", "num_output_tokens", "num_cached_tokens", "output_ids", "sequence_index"):
        given[name] = ("INT32", struct.pack("<i", name != "sequence_index"))
    given["num_input_tokens"] = ("INT32", struct.pack("<i", prompt_tokens))
    inner = service_pb2.ModelInferResponse(model_name="lightllm", model_version="1")
    inner.parameters["triton_final_response"].bool_param = finish_reason != ""
    for name, (kind, _) in PUBLIC_OUTPUTS.items():
        datatype, content = given.get(name, (kind, b""))
        inner.outputs.add(name=name, datatype=datatype, shape=[1 if content else 0])
        inner.raw_output_contents.append(content)
    data: bytes = service_pb2.ModelStreamInferResponse(infer_response=inner).SerializeToString()
    return data


async def _serve(port: int) -> None:
    async def infer(requests: AsyncIterator[Any], _: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            contents = {
                one.name: content for one, content in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            # The seed says the pause before each token, in milliseconds.
            pause = struct.unpack("<Q", contents["seed"])[0] / 1e3 if "seed" in contents else 0.0
            [count] = struct.unpack("<i", contents["max_tokens"])
            prompt_tokens = len(contents.get("input_ids", b"text")) // 4
            middle, last = response(WORD, "", prompt_tokens), response(WORD, "length", prompt_tokens)
            for number in range(count):
                await asyncio.sleep(pause)
                yield last if number == count - 1 else middle

    handler = grpc.stream_stream_rpc_method_handler(
        infer, service_pb2.ModelInferRequest.FromString, response_serializer=None
    )
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelStreamInfer": handler})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([service])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve(port: int) -> None:
    raise_file_limit()
    asyncio.run(_serve(port))


@contextlib.contextmanager
def fronted() -> Iterator[tuple[psutil.Process, int, int]]:
    """A front's process, its port, and that of the pretended server behind it."""
    grpc_port, port = free_ports(2)
    pretended = multiprocessing.get_context("spawn").Process(target=serve, args=(grpc_port,), daemon=True)
    pretended.start()
    directory = embedded_model_directory()
    config = EngineConfig(grpc_port=grpc_port, openai_port=port)
    with listening_socket(config.host, port, config.unread_timeout_s) as listener:
        descriptor = listener.fileno()
        front = subprocess.Popen(
            [*COMMAND, str(descriptor)],
            env=front_environment(config, directory, os.environ),
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(port, "/v1/models") or not _listens(grpc_port):
            if time.monotonic() > end or front.poll() is not None:
                raise RuntimeError("the front has not started")
            time.sleep(0.1)
        yield psutil.Process(front.pid), port, grpc_port
    finally:
        front.kill()
        front.wait()
        pretended.kill()
        pretended.join()


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


# The clients


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: front\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def body_of(way: str, tokens: int) -> tuple[bytes, bytes]:
    """The bytes of a request, and what ends its answer."""
    path, body, end = WAYS[way]
    limited = (
        {**body, "max_tokens": tokens} if "inputs" not in body else {**body, "parameters": {"max_new_tokens": tokens}}
    )
    return request_bytes(path, limited), end


async def ask(port: int, message: bytes, end: bytes, count: int) -> None:
    """Ask one request after the other on a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    for _ in range(count):
        writer.write(message)
        await reader.readuntil(end)
    writer.close()


async def load(port: int, way: str, tokens: int, count: int, concurrency: int) -> float:
    """Ask `count` requests; return the seconds that they took."""
    message, end = body_of(way, tokens)
    started = time.monotonic()
    await asyncio.gather(*[ask(port, message, end, count // concurrency) for _ in range(concurrency)])
    return time.monotonic() - started


def cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


# The measurements


def measure_way(process: psutil.Process, port: int, way: str, requests: int, tokens: int) -> dict[str, float]:
    """CPU time of the front a response and a request, by subtraction of requests for one token."""
    asyncio.run(load(port, way, tokens, 64, 32))
    used = []
    seconds = 0.0
    for length in (1, tokens):
        before = cpu_seconds(process)
        seconds = asyncio.run(load(port, way, length, requests, 32))
        used.append((cpu_seconds(process) - before) / requests)
    a_response = (used[1] - used[0]) / (tokens - 1)
    return {
        "request_us": 1e6 * (used[0] - a_response),
        "response_us": 1e6 * a_response,
        "responses_a_cpu_second": tokens / used[1],
        "responses_a_second": requests * tokens / seconds,
    }


def cpu_of(work: Callable[[], object], count: int) -> float:
    """Microseconds of CPU time that one of `count` calls takes in this process; the best of three."""
    best = float("inf")
    for _ in range(3):
        before = time.process_time()
        for _ in range(count):
            work()
        best = min(best, (time.process_time() - before) / count)
    return 1e6 * best


async def _read_all(grpc_port: int, requests: int, tokens: int) -> float:
    async with AsyncLightLLMClient(f"127.0.0.1:{grpc_port}") as client:

        async def read(count: int) -> None:
            for _ in range(count):
                async with client.stream("Once upon a time", max_tokens=tokens) as stream:
                    async for _ in stream:
                        pass

        await asyncio.gather(*[read(1) for _ in range(32)])
        before = time.process_time()
        await asyncio.gather(*[read(requests // 32) for _ in range(32)])
        return time.process_time() - before


def measure_parts(grpc_port: int, requests: int, tokens: int) -> dict[str, float]:
    """Microseconds of CPU time a response: the client of the ensemble by itself, its decoding, and the formatting."""
    import uvloop

    used = [uvloop.run(_read_all(grpc_port, requests, length)) / requests for length in (1, tokens)]
    message = service_pb2.ModelStreamInferResponse.FromString(response(WORD, ""))
    chunk = chunk_from_response(message.infer_response)

    class Named:
        model_name = "model"

    job = Job(Named(), ["a"], {}, [None], "chatcmpl")  # type: ignore[arg-type]
    usage, parser = Usage(1), PlainText()
    events = Events(job, "chat.completion.chunk", CompletionRequest(prompt="a"), usage)

    def form() -> bytes:
        usage.add(0, chunk)
        [delta] = parser.feed(chunk.text)
        content = f'"delta": {{"content": {text_json(delta.content)}}}'
        return events.event(choice_json(0, content, "", None)).encode()

    return {
        "gRPC client": 1e6 * (used[1] - used[0]) / (tokens - 1),
        "of which a Chunk of a message": cpu_of(lambda: chunk_from_response(message.infer_response), 2000),
        "event": cpu_of(form, 5000),
    }


async def _open_streams(process: psutil.Process, port: int, count: int) -> dict[str, float]:
    """Open streams that get a token a second; return what each costs while all are open."""
    body = {"prompt": "Once upon a time", "stream": True, "max_tokens": 10_000, "seed": 1000}
    message = request_bytes("/v1/completions", body)
    await load(port, "completions, stream", 64, 128, 32)  # what is loaded and allocated once
    memory, descriptors = process.memory_info().rss, process.num_fds()
    connections = []
    for first in range(0, count, 100):
        opened = await asyncio.gather(*[asyncio.open_connection("127.0.0.1", port) for _ in range(first, first + 100)])
        for _, writer in opened:
            writer.write(message)
        await asyncio.gather(*[reader.readuntil(b"\n\n") for reader, _ in opened])
        connections += opened
    await asyncio.gather(*[reader.readuntil(b"data: ") for reader, _ in connections])
    before, started = cpu_seconds(process), time.monotonic()
    await asyncio.sleep(10)
    figures = {
        "streams": float(count),
        "kib_a_stream": (process.memory_info().rss - memory) / count / 1024,
        "descriptors_a_stream": (process.num_fds() - descriptors) / count,
        "cpu_share": (cpu_seconds(process) - before) / (time.monotonic() - started),
    }
    for _, writer in connections:
        writer.close()
    return figures


async def _slow_readers(process: psutil.Process, port: int, count: int) -> dict[str, float]:
    """Open streams of 4 MB each that nobody reads; return what they make of the front, and of its other streams."""
    long = request_bytes("/v1/completions", {"prompt": "Once upon a time", "stream": True, "max_tokens": 20_000})
    alone = await _cpu_beside(process, port)
    before = process.memory_info().rss
    sockets = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel takes megabytes for the client
        one.connect(("127.0.0.1", port))
        one.sendall(long)
        sockets.append(one)
    used = 0.0
    while cpu_seconds(process) - used > IDLE_SHARE * IDLE_SECONDS:  # until every stream is held back
        used = cpu_seconds(process)
        await asyncio.sleep(IDLE_SECONDS)
    memory = process.memory_info().rss
    beside = await _cpu_beside(process, port)
    for one in sockets:
        one.close()
    return {
        "readers": float(count),
        "kib_a_reader": (memory - before) / count / 1024,
        "request_us_alone": alone,
        "request_us_beside": beside,
    }


async def _cpu_beside(process: psutil.Process, port: int) -> float:
    """CPU microseconds of the front for an answer of 64 tokens, as a mean of 256."""
    before = cpu_seconds(process)
    await load(port, "completions, stream", 64, 256, 8)
    return 1e6 * (cpu_seconds(process) - before) / 256


@click.command()
@click.option("--requests", default=320, show_default=True, help="requests of each measurement, a multiple of 32")
@click.option("--tokens", default=64, show_default=True, help="tokens of each answer")
@click.option("--streams", default=2000, show_default=True, help="streams that are open at once")
@click.option("--slow", default=200, show_default=True, help="clients that do not read")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "front_throughput.json", show_default=True)
def main(requests: int, tokens: int, streams: int, slow: int, out: Path) -> None:
    """Measure a process of the front."""
    raise_file_limit()
    result: dict[str, Any] = {"ways": {}}
    with fronted() as (process, port, grpc_port):
        for way in WAYS:
            result["ways"][way] = measure_way(process, port, way, requests, tokens)
        result["parts_us"] = measure_parts(grpc_port, requests, tokens)
    with fronted() as (process, port, _):
        result["open_streams"] = asyncio.run(_open_streams(process, port, streams))
    with fronted() as (process, port, _):
        result["slow_readers"] = asyncio.run(_slow_readers(process, port, slow))
    click.echo(json.dumps(result, indent=2))
    where = circumstances(None)
    where["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    write_result(out, {"benchmark": "front_throughput", **where, **result})


if __name__ == "__main__":
    main()
