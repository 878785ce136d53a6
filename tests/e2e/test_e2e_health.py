# SPDX-License-Identifier: Apache-2.0
"""The launch command under a flood of requests: a busy server is left alone, one that stands still is found."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lightllm_client import LightLLMClient, LightLLMError, Unavailable
from tests.e2e.server import REPOSITORY, engine_environment, free_ports, get
from tests.polling import poll

pytestmark = pytest.mark.e2e

# With shorter times than the command has by itself, so that a flood of seconds is what one of minutes is to it.
PROBE_SECONDS = 2.0
PROGRAM = f"""
from lightllm_backend import serve
from lightllm_backend.launch import health
health.PROBE_SECONDS, health.LATE_BEAT_SECONDS = {PROBE_SECONDS}, 4.0
serve.command()
"""
FOUND_SECONDS = 40.0  # five checks, each of two probes' length, and the server's end


class LaunchCommand:
    """The launch command on free ports, from construction to `stop`."""

    def __init__(self, log: Path, **settings: object) -> None:
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": metrics_port}
        environment = engine_environment({**settings, **ports})
        self.log_path = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM], env=environment, stderr=output, cwd=REPOSITORY.parent
            )

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def wait_ready(self) -> LaunchCommand:
        assert poll(lambda: "ready after" in self.log() or self.process.poll() is not None, 120), self.log()
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def find(self, role: str) -> psutil.Process:
        """A process by what it is: "tritonserver", "worker", or a model."""
        patterns = {"tritonserver": r"/tritonserver ", "worker": r"lightllm_backend\.worker\.main"}
        pattern = patterns.get(role, rf"triton_python_backend_stub .*/{role}/")
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if re.search(pattern, " ".join(process.cmdline()) + " "):
                return process
        raise AssertionError(f"there is no {role}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(120)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[LaunchCommand]:
    started = LaunchCommand(tmp_path / "log", max_queue_size=200)
    try:
        yield started.wait_ready()
    finally:
        started.stop()


async def flood(port: int, count: int, max_tokens: int, seconds: float) -> Counter[str]:
    """Send `count` requests at once, and say how they have ended: a status, or what became of the connection."""

    async def request() -> str:
        body = json.dumps({"text_input": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True}).encode()
        head = f"POST /v2/models/lightllm/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            status = (await asyncio.wait_for(reader.readline(), seconds)).decode()
            writer.close()
        except TimeoutError:
            return "no answer"
        except OSError:
            return "closed"
        return status.split(" ")[1] if status else "closed"

    return Counter(await asyncio.gather(*(request() for _ in range(count))))


def test_a_flood_does_not_take_a_healthy_server_down(command: LaunchCommand) -> None:
    """Four tokens each for many more at once than the CPU answers in several probes' time."""
    started = time.monotonic()
    ends = asyncio.run(flood(command.http_port, 1500, max_tokens=4, seconds=300))
    seconds = time.monotonic() - started
    assert seconds > 4 * PROBE_SECONDS, f"the flood took {seconds:.1f} s: too short to prove anything"
    assert set(ends) <= {"200", "400"}, ends  # answered, or the queue was full
    assert ends["200"] >= 200
    assert command.process.poll() is None, command.log()
    assert "error" not in command.log()
    with LightLLMClient(command.grpc_url, timeout=60) as client:
        client.health()
        assert client.generate("The capital of Japan is", max_tokens=1).text == " Tokyo"


class Streams:
    """Users that stream, each in a thread of asyncio's; what each has ended with."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.count = url, count
        self.begun = 0
        self.ends: list[str] = []

    def one(self) -> None:
        with LightLLMClient(self.url, timeout=200) as client:
            try:
                for _ in client.stream("Once upon a time", max_tokens=2000, ignore_eos=True):
                    self.begun += 1
                self.ends.append("whole")
            except LightLLMError as error:
                self.ends.append(f"{type(error).__name__}: {error}")

    async def run(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(self.one) for _ in range(self.count)))


def under_load(command: LaunchCommand, act: Callable[[], float]) -> tuple[list[str], float]:
    """Eight streams, requests that come and go, and `act` in their midst; the streams' ends, and what `act` says."""
    streams = Streams(command.grpc_url, 8)

    async def run() -> float:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
        streaming = asyncio.create_task(streams.run())
        while streams.begun < 16:
            await asyncio.sleep(0.05)
        flooding = asyncio.create_task(flood(command.http_port, 100, max_tokens=200, seconds=100))
        acted = await asyncio.to_thread(act)
        await asyncio.wait_for(streaming, 60)
        await flooding
        return acted

    acted = asyncio.run(run())
    return streams.ends, acted


@pytest.mark.parametrize("role", ["tokenizer", "generation", "detokenizer", "lightllm_unary", "health", "tritonserver"])
def test_a_step_that_stands_still_is_found_under_load(command: LaunchCommand, role: str) -> None:
    def stop_it() -> float:
        command.find(role).send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert poll(lambda: command.process.poll() is not None, 2 * FOUND_SECONDS), command.log()
        return time.monotonic() - stopped

    ends, seconds = under_load(command, stop_it)
    assert seconds < FOUND_SECONDS
    assert command.process.returncode == 1
    assert "error: the server does not work any more and is stopped: " in command.log()
    assert f"{role} (process " in command.log()
    assert len(ends) == 8
    assert "whole" not in ends
    if role in ("tokenizer", "lightllm_unary", "health"):  # the others are on the way of the errors themselves
        assert all("UNAVAILABLE: the server is stopped" in end for end in ends), ends


def test_a_worker_that_stands_still_is_replaced_under_load(command: LaunchCommand) -> None:
    worker = command.find("worker")

    def stop_it() -> float:
        worker.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        with LightLLMClient(command.grpc_url) as client:
            assert poll(lambda: not is_ready(client), FOUND_SECONDS, every=0.5)
            assert poll(lambda: not worker.is_running(), FOUND_SECONDS), command.log()
            found = time.monotonic() - stopped
            assert poll(lambda: is_ready(client), 60, every=0.5), command.log()
        return found

    ends, seconds = under_load(command, stop_it)
    assert seconds < FOUND_SECONDS
    assert "error: the engine is replaced: worker-0 (process " in command.log()
    assert all("the engine stopped while the request was running" in end for end in ends), ends
    assert command.process.poll() is None
    with LightLLMClient(command.grpc_url, timeout=60) as client:
        assert client.generate("The capital of Japan is", max_tokens=1).text == " Tokyo"


def is_ready(client: LightLLMClient) -> bool:
    try:
        client.health()
    except Unavailable:
        return False
    return True


def test_a_dead_step_is_found_at_once(command: LaunchCommand) -> None:
    command.find("detokenizer").kill()
    assert poll(lambda: command.process.poll() is not None, FOUND_SECONDS), command.log()
    assert re.search(r"is stopped: detokenizer \(process \d+\) is dead", command.log())
    with pytest.raises(ConnectionRefusedError):
        get(command.http_port, "/v2/health/ready")
