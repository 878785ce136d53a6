# SPDX-License-Identifier: Apache-2.0
"""The launch command leaves a server alone that is busy, or whose models were unloaded; and no answer is lost."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightllm_backend.launch.health import http_call
from lightllm_client import LightLLMClient, LightLLMError, Unavailable
from tests.e2e.frozen_threads import connection_threads, frozen
from tests.e2e.launch_command import LaunchCommand, flood
from tests.e2e.server import executions, read_metrics
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROBE_SECONDS = 2.5  # within two seconds a busy step may take nothing for want of a core


@pytest.fixture(scope="module")
def command(sleeping_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchCommand]:
    folder = tmp_path_factory.mktemp("command")
    limits = {"running_max_req_size": 50, "max_queue_size": 200}
    settings = {"worker_python": sleeping_python, "open_apis": "model-repository", **limits}
    started = LaunchCommand(folder, PROBE_SECONDS, **settings)
    try:
        yield started.wait_ready()
    finally:
        started.stop()


def test_a_flood_does_not_take_a_healthy_server_down(command: LaunchCommand) -> None:
    """More at once than the queue holds, over and over, until several probes have come and gone."""
    started = time.monotonic()
    ends = Counter[str]()
    while time.monotonic() < started + 3 * PROBE_SECONDS:
        ends += asyncio.run(flood(command.http_port, 450, max_tokens=20, seconds=120))
    assert set(ends) <= {"200", "400"}, ends  # answered, or the queue was full
    assert ends["200"] >= 200
    assert command.process.poll() is None, command.log()
    assert "error" not in command.log()
    with LightLLMClient(command.grpc_url, timeout=60, max_retries=0) as client:
        client.health()
        assert client.generate("The capital of Japan is", max_tokens=1).num_output_tokens == 1


def answered(command: LaunchCommand) -> float:
    return read_metrics(command.metrics_port)['lightllm_requests_total{status="length"}']


def test_no_answer_over_http_is_lost_while_the_threads_that_send_them_stand_still(command: LaunchCommand) -> None:
    """An answer takes two messages; by default 278 fit, and Triton server drops the others."""
    server, count = command.find("tritonserver"), 180
    body = json.dumps({"text_input": "Once upon a time", "max_tokens": 4, "ignore_eos": True})
    request = f"POST /v2/models/lightllm/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", command.http_port), 60)) for _ in range(count)
        ]
        assert poll(lambda: connection_threads(server, command.http_port))
        threads = connection_threads(server, command.http_port)
        taken, ended = executions(command.http_port, "generation"), answered(command)
        for client in clients:
            client.sendall(request.encode())
        assert poll(lambda: executions(command.http_port, "generation") >= taken + count)
        with frozen(server, threads):
            assert poll(lambda: answered(command) >= ended + count)
        for client in clients:
            with client.makefile("rb") as answer:
                assert answer.readline().startswith(b"HTTP/1.1 200")
                assert b"0\r\n" in iter(answer.readline, b"")


@pytest.mark.parametrize("model", ["tokenizer", "generation"])
def test_a_model_may_be_unloaded_for_as_long_as_one_likes(command: LaunchCommand, model: str) -> None:
    server = command.find("tritonserver")
    address = f"127.0.0.1:{command.http_port}"
    assert http_call(address, "POST", f"/v2/repository/models/{model}/unload", "{}", 60) == (200, "")
    time.sleep(6 * PROBE_SECONDS)  # so many probes have failed
    with LightLLMClient(command.grpc_url, timeout=60, max_retries=0) as client:
        with pytest.raises(LightLLMError, match="has no available versions"):
            client.generate("The capital of Japan is", max_tokens=1)
        with pytest.raises(Unavailable, match=f"{model} is not loaded"):
            client.health()
        assert http_call(address, "POST", f"/v2/repository/models/{model}/load", "{}", 300) == (200, "")
        assert client.generate("The capital of Japan is", max_tokens=1).num_output_tokens == 1
        client.health()
    assert server.is_running(), command.log()
    assert "error" not in command.log()
