# SPDX-License-Identifier: Apache-2.0
"""When the launch command gives a server up: probes against a stand-in on the loopback."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from lightllm_backend import serve
from lightllm_backend.engine.channel import EngineStats


class Answers:
    """A server on the loopback whose answers a test chooses: a status and a text, or silence."""

    def __init__(self) -> None:
        self.status, self.text, self.silent = 200, "", threading.Event()
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, json.loads(body)))
                if outer.silent.is_set():
                    time.sleep(0.5)
                    return
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.text.encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setattr(serve, "PROBE_SECONDS", 0.1)
    answers = Answers()
    yield answers
    answers.server.shutdown()
    answers.server.server_close()


def health_of(answers: Answers, start_seconds: float = 0.0) -> tuple[serve.Health, Any]:
    engine = SimpleNamespace(up=True)
    return serve.Health(answers.address, engine, start_seconds), engine  # type: ignore[arg-type]


def test_a_probe_is_a_request_for_one_token_to_each_entry(answers: Answers) -> None:
    health, _ = health_of(answers)
    assert health.probe() is None
    assert [path for path, _ in answers.asked] == [
        "/v2/models/lightllm/generate",
        "/v2/models/lightllm_unary/generate",
    ]
    assert all(body["max_tokens"] == 1 for _, body in answers.asked)


@pytest.mark.parametrize("silent", [False, True])
def test_three_failures_in_a_row_are_the_end(answers: Answers, silent: bool) -> None:
    health, _ = health_of(answers)
    answers.status, answers.text = 500, "the stub is gone"
    if silent:
        answers.silent.set()
    reasons = [health.probe() for _ in range(3)]
    assert reasons[:2] == [None, None]
    assert ("does not answer" if silent else "the stub is gone") in str(reasons[2])


def test_so_are_three_among_the_last_five(answers: Answers) -> None:
    health, _ = health_of(answers)
    answers.text = "one of two stubs is gone"
    reasons = []
    for answers.status in (500, 200, 200, 500, 200, 500, 500):
        reasons.append(health.probe())
    assert reasons[:-1] == [None] * 6
    assert "one of two stubs is gone" in str(reasons[-1])


def test_a_server_that_is_gone_fails(answers: Answers) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    health = serve.Health(address, SimpleNamespace(up=True), 0.0)  # type: ignore[arg-type]
    assert "does not answer" in str([health.probe() for _ in range(3)][2])


def test_a_long_queue_that_moves_is_no_failure_and_one_that_stands_is(answers: Answers) -> None:
    health, _ = health_of(answers)
    answers.silent.set()
    for step in range(4):
        health.on_stats(EngineStats(queued_requests=3, generated_tokens_total=step))
        timer = threading.Timer(
            0.05, health.on_stats, [EngineStats(queued_requests=3, generated_tokens_total=step + 1)]
        )
        timer.start()
        assert health.probe() is None
        timer.join()
    assert [health.probe() is None for _ in range(3)] == [True, True, False]


def test_an_answer_of_the_queue_is_an_answer(answers: Answers) -> None:
    health, _ = health_of(answers)
    answers.status, answers.text = 400, '{"error":"UNAVAILABLE: the queue is full (10 requests)"}'
    assert [health.probe() for _ in range(4)] == [None] * 4


def test_an_engine_that_starts_again_has_time(answers: Answers) -> None:
    health, engine = health_of(answers, start_seconds=0.3)
    engine.up = False
    answers.status, answers.text = 400, "UNAVAILABLE: the engine is not up; try again"
    assert [health.probe() for _ in range(5)] == [None] * 5
    time.sleep(0.6)
    assert health.probe() is None
    assert health.probe() is None
    assert "not up" in str(health.probe())
