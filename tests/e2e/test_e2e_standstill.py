# SPDX-License-Identifier: Apache-2.0
"""Any process of a server may die or stand still at any time: streams end, the service comes back, nothing is left."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllm_client import LightLLMClient, Unavailable
from perf.sleeping_engine import STEP_MS, write_python
from tests.e2e.faults import HEADER, Streams, inject, serves
from tests.e2e.launch_command import LaunchCommand
from tests.polling import poll

pytestmark = pytest.mark.e2e

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
STEPS = ("tokenizer", "generation", "detokenizer", "lightllm_unary", "health")
DEAD_SECONDS, STILL_SECONDS = 5.0, 30.0  # until a fault is found
ENDED_SECONDS = 5.0  # from then until every stream has ended
STOPPED_SECONDS = 5.0  # that a stop takes beyond `shutdown_timeout_s`
BUSY_SECONDS = 10.0  # more, on a machine that is busy with other things

# Faults of each kind, for every run of the tests; the others follow under the marker soak.
FEW = [("worker-0", STOP), ("tokenizer", KILL), ("detokenizer", STOP)]
ALL = [(role, number) for role in ("worker-0", *STEPS, "tritonserver") for number in (KILL, STOP)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The setting worker_python: an engine that only tells the time, in steps of a fifth of a second."""
    return write_python(tmp_path_factory.mktemp("sleeping_engine") / "python", **{STEP_MS: 200})


@pytest.fixture(scope="module")
def command(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchCommand]:
    started = LaunchCommand(
        tmp_path_factory.mktemp("command"), worker_python=python, running_max_req_size=10, restart=20
    )
    try:
        yield started.wait_ready()
    finally:
        started.stop()


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchCommand]:
    started = LaunchCommand(tmp_path_factory.mktemp("two_ranks"), model_dir=tiny_model, tp=2)
    try:
        yield started.wait_ready()
    finally:
        started.stop()


def check(command: LaunchCommand, role: str, number: signal.Signals, max_tokens: int = 2000) -> None:
    outcome = inject(command, role, number, max_tokens)
    print(f"\n{HEADER}\n{outcome}")
    assert outcome.found < (DEAD_SECONDS if number is KILL else STILL_SECONDS) + BUSY_SECONDS
    assert outcome.ended < outcome.found + ENDED_SECONDS + BUSY_SECONDS
    assert "whole" not in outcome.ends
    assert outcome.left == []
    if role in ("tokenizer", "lightllm_unary", "health"):  # the others are on the way of the errors themselves
        # On a busy machine the server may be stopped before it has written the last of them.
        assert sum("the server is stopped: " in end for end in outcome.ends) >= len(outcome.ends) / 2, outcome.ends
    if role.startswith("worker"):
        message = "UNAVAILABLE: the engine stopped while the request was running; try again"
        assert all(message in end for end in outcome.ends), outcome.ends


@pytest.mark.parametrize(("role", "number"), FEW)
def test_a_fault_is_found_and_the_service_comes_back(command: LaunchCommand, role: str, number: signal.Signals) -> None:
    check(command, role, number)


@pytest.mark.soak
@pytest.mark.parametrize(("role", "number"), [fault for fault in ALL if fault not in FEW])
def test_every_other_fault(command: LaunchCommand, role: str, number: signal.Signals) -> None:
    check(command, role, number)


@pytest.mark.soak
@pytest.mark.parametrize("number", [KILL, STOP])
def test_a_fault_of_another_rank(two_ranks: LaunchCommand, number: signal.Signals) -> None:
    check(two_ranks, "worker-1", number, max_tokens=1000)


def test_a_stopped_worker_makes_the_server_unready_at_once(command: LaunchCommand) -> None:
    with LightLLMClient(command.grpc_url, max_retries=0) as client:
        worker = command.find("worker-0")
        assert poll(lambda: is_ready(client))
        worker.send_signal(STOP)
        assert poll(lambda: not is_ready(client), 20)
        worker.send_signal(signal.SIGCONT)
        assert poll(lambda: is_ready(client), 20), "it went on before it was given up"
    assert serves(command)


def is_ready(client: LightLLMClient) -> bool:
    try:
        client.health()
    except Unavailable:
        return False
    return True


def test_a_stopped_launch_command_is_not_missed(command: LaunchCommand) -> None:
    """As by Ctrl-Z."""
    command.process.send_signal(STOP)
    try:
        streams = Streams(command.grpc_url, command.http_port, max_tokens=8)
        assert streams.wait_ended(60)
        assert {end for _, end in streams.ends} == {"whole"}
    finally:
        command.process.send_signal(signal.SIGCONT)


def test_a_killed_guard_is_replaced(command: LaunchCommand) -> None:
    guard = command.find("guard")
    guard.kill()
    assert poll(lambda: [one for one in command.find_all("guard") if one.pid != guard.pid])
    assert serves(command)


def test_sigterm_lets_running_requests_end_and_refuses_the_others(command: LaunchCommand) -> None:
    """The last of the tests with this server: ten requests run, four are queued."""
    traces = command.traces()
    streams = Streams(command.grpc_url, command.http_port, max_tokens=60, count=5)
    streams.wait_begun()
    queued = Streams(command.grpc_url, command.http_port, max_tokens=1, count=2)
    with LightLLMClient(command.grpc_url, max_retries=0) as client:
        time.sleep(0.2)
        command.process.terminate()
        assert queued.wait_ended(60)
        with pytest.raises(Unavailable, match="the server is shutting down"):
            client.generate("Hello", max_tokens=1)
        with pytest.raises(Unavailable, match="the server is being stopped and takes no more requests"):
            client.health()
    reason = "the server is shutting down"
    assert all(reason in end for _, end in queued.ends), queued.ends
    assert command.process.wait(60) == 0
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d shutting down: ", command.log(), re.MULTILINE), command.log()
    assert {end for _, end in streams.ends} == {"whole"}
    assert poll(lambda: not traces.left()), traces.left()


# Faults of the launch command itself


@pytest.mark.parametrize("loads", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_killed_launch_command_leaves_nothing(python: Path, tmp_path: Path, loads: bool) -> None:
    command = LaunchCommand(tmp_path, worker_python=python)
    try:
        if loads:
            assert poll(lambda: list(command.find_all("worker-0")), 60, every=0.05)
        else:
            command.wait_ready()
        traces = command.traces()
    finally:
        begun = time.monotonic()
        command.process.kill()
        command.process.wait()
    assert poll(lambda: not traces.left(), 2 * DEAD_SECONDS + BUSY_SECONDS), traces.left()
    print(f"\nnothing left after {time.monotonic() - begun:.1f} s")


@pytest.mark.soak
@pytest.mark.parametrize("killed", [True, False])
def test_a_stop_keeps_its_time(python: Path, tmp_path: Path, killed: bool) -> None:
    """With streams that run at the limit, and right after a worker was killed, whose contexts Triton server leaks."""
    limit = 1.0
    command = LaunchCommand(tmp_path, worker_python=python, shutdown_timeout_s=limit).wait_ready()
    streams = Streams(command.grpc_url, command.http_port, max_tokens=2000)
    streams.wait_begun()
    traces = command.traces()
    if killed:
        command.find("worker-0").kill()
    begun = time.monotonic()
    assert command.stop() == (0 if killed else 3), command.log()
    seconds = time.monotonic() - begun
    print(f"\nstopped after {seconds:.1f} s; allowed: {limit:g} s and {STOPPED_SECONDS:g} s on a quiet machine")
    assert seconds < limit + STOPPED_SECONDS + BUSY_SECONDS
    assert streams.wait_ended(5)
    if not killed:
        assert all("the server is shutting down" in end for _, end in streams.ends), streams.ends
    assert poll(lambda: not traces.left()), traces.left()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_starts_and_stops_leave_nothing(tiny_model: Path, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    seconds = {"ready": 0.0, "loading": 0.0}  # the longest stop
    for index in range(50):
        (tmp_path / str(index)).mkdir()
        command = LaunchCommand(tmp_path / str(index), model_dir=tiny_model)
        state = "loading" if index % 2 else "ready"
        try:
            if state == "loading":
                assert poll(lambda command=command: list(command.find_all("generation")), 300)  # type: ignore[misc]
            else:
                command.wait_ready()
            traces = command.traces()
        finally:
            begun = time.monotonic()
            code = command.stop()
        seconds[state] = max(seconds[state], time.monotonic() - begun)
        assert code == 0, command.log()
        assert poll(lambda traces=traces: not traces.left()), traces.left()  # type: ignore[misc]
    print(f"\nthe longest stops, in seconds: {seconds}")
    assert max(seconds.values()) < STOPPED_SECONDS + BUSY_SECONDS
    assert len(set(Path("/dev/shm").iterdir()) - before) == 0
