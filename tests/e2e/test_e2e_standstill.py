# SPDX-License-Identifier: Apache-2.0
"""The launch command finds a process that stands still or is dead, also while users keep the server busy."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightllm_client import LightLLMClient, LightLLMError, Unavailable
from tests.e2e.launch_command import LaunchCommand, flood
from tests.e2e.server import get
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROBE_SECONDS = 1.0
LATE_BEAT_SECONDS = 2.5  # a process beats every second
FOUND_SECONDS = 40.0  # five checks, each of two probes' length, and the server's end


def running(log: Path, probe_seconds: float, late_beat_seconds: float) -> Iterator[LaunchCommand]:
    started = LaunchCommand(log, probe_seconds, late_beat_seconds, max_queue_size=200)
    try:
        yield started.wait_ready()
    finally:
        started.stop()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[LaunchCommand]:
    yield from running(tmp_path / "log", PROBE_SECONDS, LATE_BEAT_SECONDS)


@pytest.fixture
def patient_command(tmp_path: Path) -> Iterator[LaunchCommand]:
    """With times in which a busy worker beats, and steps take something, though they wait for a core."""
    yield from running(tmp_path / "log", 2 * PROBE_SECONDS, 4.0)


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


def test_a_worker_that_stands_still_is_replaced_under_load(patient_command: LaunchCommand) -> None:
    command = patient_command
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
        assert poll(lambda: capital(client) == " Tokyo", 30, every=0.5), command.log()


def capital(client: LightLLMClient) -> str:
    """The answer; nothing while generation has not connected to the new worker yet."""
    try:
        return client.generate("The capital of Japan is", max_tokens=1).text
    except Unavailable:
        return ""


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
