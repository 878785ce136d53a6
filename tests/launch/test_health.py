# SPDX-License-Identifier: Apache-2.0
"""What counts as a server that works: probes against a stand-in on the loopback, and made-up vitals."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightllm_backend.launch import health
from lightllm_backend.launch.health import Health, http_call, why_unready

DEAD_PID = 4_999_999
ROLES = (*health.STEPS, health.ENGINE)


class Answers:
    """What a server answers to each call: a status and a text after `seconds` of a clock of its own, or silence."""

    def __init__(self) -> None:
        self.status, self.text, self.seconds, self.silent = 200, "", 0.0, False
        self.meanwhile: Callable[[], None] = lambda: None  # happens in the midst of each check
        self.asked: list[tuple[str, Any]] = []
        self.skipped = 0.0  # seconds that the clock is ahead

    def clock(self) -> float:
        return time.monotonic() + self.skipped

    def call(self, address: str, method: str, path: str, body: str, timeout: float) -> tuple[int, str]:
        assert (address, method, timeout) == ("the address", "POST", health.PROBE_SECONDS)
        self.asked.append((path, json.loads(body)))
        if "unary" in path:
            self.meanwhile()
        if self.silent:
            raise TimeoutError
        self.skipped += self.seconds
        return self.status, self.text


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr(health, "http_call", answers.call)
    return answers


class Processes:
    """The vitals of a server's processes, all of them this one, so that each lives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken = dict.fromkeys(ROLES, 0)
        self.pids = dict.fromkeys(ROLES, os.getpid())
        self.silent: dict[str, float] = {}  # seconds since the last beat
        self.busy: dict[str, float] = {}  # seconds
        self.publish()

    def publish(self) -> None:
        now = time.monotonic()
        for role in ROLES:
            busy_since = now - self.busy[role] if role in self.busy else 0.0
            fields = struct.pack("dqddqq", now - self.silent.get(role, 0.0), self.taken[role], busy_since, 30.0, 0, 0)
            (self.directory / f"{role}-{self.pids[role]}.vitals").write_bytes(fields)

    def move(self, *roles: str) -> None:
        for role in roles or ROLES:
            self.taken[role] += 1
        self.publish()


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path)


@pytest.fixture
def engine() -> Any:
    return SimpleNamespace(up=True)


@pytest.fixture
def watch(answers: Answers, processes: Processes, engine: Any) -> Health:
    return Health("the address", processes.directory, engine, 300.0, "the key", answers.clock)


def check_while(watch: Health, answers: Answers, processes: Processes, *moving: str) -> str | None:
    """One check, in the midst of which these roles take something."""
    answers.meanwhile = lambda: processes.move(*moving)
    try:
        return watch.check()
    finally:
        answers.meanwhile = lambda: None


# Probes


def test_a_probe_is_a_request_for_one_token_to_each_entry(answers: Answers, watch: Health) -> None:
    assert watch.check() is None
    assert {path for path, _ in answers.asked} == {
        "/v2/models/lightllm/generate",
        "/v2/models/lightllm_unary/generate",
    }
    for _, body in answers.asked:
        assert (body["max_tokens"], body["probe_key"]) == (1, "the key")
        assert body["timeout"] == 10_000_000, "a probe that nobody waits for any more does not stay in the queue"


@pytest.mark.parametrize("silent", [False, True])
def test_three_failures_in_a_row_are_the_end(answers: Answers, watch: Health, silent: bool) -> None:
    answers.status, answers.text = 500, "the stub is gone"
    if silent:
        answers.silent = True
    failures = [watch.check() for _ in range(3)]
    assert failures[:2] == [None, None]
    assert failures[2] is not None
    assert ("does not answer within" if silent else "the stub is gone") in failures[2]


def test_so_are_three_among_the_last_five(answers: Answers, watch: Health) -> None:
    answers.text = "one of two stubs is gone"
    failures = []
    for answers.status in (500, 200, 200, 500, 200, 500, 500):
        failures.append(watch.check())
    assert failures[:-1] == [None] * 6
    assert "one of two stubs is gone" in str(failures[-1])


def test_a_server_that_is_gone_fails(processes: Processes, engine: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    watch = Health(address, processes.directory, engine, 0.0)
    assert "does not answer: " in str([watch.check() for _ in range(3)][2])


def test_a_call_gets_the_answer_or_ends_in_time() -> None:
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/silent":
                released.wait()
                return
            self.send_response(418)
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        assert http_call(address, "POST", "/", "the body", 60) == (418, "the body")
        with pytest.raises(TimeoutError):
            http_call(address, "POST", "/silent", "", 0.05)
        released.set()
        server.shutdown()


# Load


def test_a_late_probe_is_no_failure_while_every_step_takes_requests(
    answers: Answers, watch: Health, processes: Processes
) -> None:
    answers.silent = True
    assert [check_while(watch, answers, processes) for _ in range(5)] == [None] * 5


@pytest.mark.parametrize("stuck", ROLES)
def test_it_is_one_where_a_step_takes_nothing(
    answers: Answers, watch: Health, processes: Processes, stuck: str
) -> None:
    answers.silent = True
    moving = [role for role in ROLES if role != stuck]
    failures = [check_while(watch, answers, processes, *moving) for _ in range(3)]
    assert failures[:2] == [None, None]
    assert "does not answer within" in str(failures[2])


def test_an_engine_in_the_midst_of_a_long_step_is_at_work(
    answers: Answers, watch: Health, processes: Processes
) -> None:
    answers.silent = True
    processes.busy[health.ENGINE] = 20.0
    assert [check_while(watch, answers, processes, *health.STEPS) for _ in range(4)] == [None] * 4
    steps = [step for step in health.STEPS if step != "detokenizer"]
    assert [check_while(watch, answers, processes, *steps) for _ in range(4)] == [None] * 4, (
        "nothing comes to the detokenizer"
    )


def test_a_wrong_answer_is_a_failure_under_load_too(answers: Answers, watch: Health, processes: Processes) -> None:
    answers.status, answers.text = 500, "the stub is gone"
    assert "the stub is gone" in str([check_while(watch, answers, processes) for _ in range(3)][2])


@pytest.mark.parametrize(
    "text",
    ["CANCELLED: the request's deadline has passed", "UNAVAILABLE: the request waited in the queue for 1 seconds"],
)
def test_an_answer_that_tells_of_waiting_is_late(
    answers: Answers, watch: Health, processes: Processes, text: str
) -> None:
    answers.status, answers.text, answers.seconds = 400, text, health.PROBE_SECONDS
    assert [check_while(watch, answers, processes) for _ in range(4)] == [None] * 4
    assert [watch.check() is None for _ in range(3)] == [True, True, False]


def test_an_engine_that_starts_again_has_time(
    answers: Answers, watch: Health, processes: Processes, engine: Any
) -> None:
    engine.up = False
    processes.pids[health.ENGINE] = DEAD_PID
    (processes.directory / f"{health.ENGINE}-{os.getpid()}.vitals").unlink()
    processes.publish()
    answers.status, answers.text = 400, "UNAVAILABLE: the engine is not up; try again"
    assert [watch.check() for _ in range(5)] == [None] * 5
    answers.skipped += 600.0  # twice the time of the first start
    assert [watch.check() for _ in range(2)] == [None] * 2
    assert "not up" in str(watch.check())


def test_what_was_unloaded_is_not_asked_for(answers: Answers, watch: Health) -> None:
    answers.status, answers.text = 404, "Request for unknown model: 'lightllm' has no available versions"
    assert [watch.check() for _ in range(5)] == [None] * 5


def test_a_model_that_never_was_there_is_missed(answers: Answers, watch: Health) -> None:
    answers.status, answers.text = 404, "Request for unknown model: 'lightllm' is not found"
    assert "is not found" in str([watch.check() for _ in range(3)][2])


def test_while_generation_is_unloaded_there_need_not_be_an_engine(
    answers: Answers, watch: Health, processes: Processes, engine: Any
) -> None:
    engine.up = False
    vitals = processes.directory / f"generation-{os.getpid()}.vitals"
    vitals.unlink()
    answers.status, answers.text = 400, "UNAVAILABLE: the engine is not up; try again"
    assert watch.check() is None
    answers.skipped += 1000.0
    assert [watch.check() for _ in range(5)] == [None] * 5
    processes.publish()
    assert [watch.check() for _ in range(5)] == [None] * 5, "it has just been loaded"
    answers.skipped += 600.0  # twice the time of the first start
    assert [watch.check() is None for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("restarting", [False, True])
def test_an_error_that_comes_at_once_is_never_excused(
    answers: Answers, watch: Health, processes: Processes, engine: Any, restarting: bool
) -> None:
    """As of a server whose generation step is dead, with or without an engine that seems to start again."""
    answers.status, answers.text = 500, "CANCELLED: Stub process 'generation_0_0' is not healthy."
    engine.up = not restarting
    assert "is not healthy" in str([check_while(watch, answers, processes) for _ in range(3)][2])


# Processes


def test_a_server_is_ready_when_all_its_processes_work(processes: Processes) -> None:
    assert why_unready(processes.directory) is None
    (processes.directory / f"tokenizer-{os.getpid()}.vitals").unlink()
    processes.busy["generation"] = 99.0
    processes.pids["tokenizer"] = DEAD_PID
    processes.publish()
    (processes.directory / f"tokenizer-{DEAD_PID}.vitals").unlink()
    assert why_unready(processes.directory) == (
        f"tokenizer is not loaded; generation (process {os.getpid()}) has been stuck for 99 s"
    )
