# SPDX-License-Identifier: Apache-2.0
"""Random requests to a real server while a neighbour's answers go on: each has a right answer or a clear error.

These are the same requests in every run; `python -m tests.fuzz CASES --server` sends as many others as one likes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from lightllm_client import LightLLMClient
from tests.e2e.server import TritonServer
from tests.fuzz import http_calls
from tests.fuzz.front_server import ListeningFront
from tests.fuzz.requests import Call, calls, check
from tests.polling import poll

pytestmark = pytest.mark.e2e

CASES = 60
FRONT_CASES = 20
PROMPT = "Once upon a time"


def is_short(call: http_calls.HttpCall) -> bool:
    """Whether the answer has few tokens: a chat without a limit has as many as fit."""
    return "chat" not in call.path or b'"max_completion_tokens": 2' in call.body


def test_bad_requests_harm_nobody(server: TritonServer, client: LightLLMClient, http: httpx.Client) -> None:
    front = ListeningFront(http.base_url.port or 0)
    expected = client.generate(PROMPT, max_tokens=40, ignore_eos=True).text
    done = Event()

    def neighbour() -> list[str]:
        answers = []
        while not done.is_set():
            chunks = client.stream(PROMPT, max_tokens=40, ignore_eos=True)
            answers.append("".join(chunk.text for chunk in chunks))
        return answers

    @settings(max_examples=CASES, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls)
    def send(call: Call) -> None:
        check(server, call)

    @settings(max_examples=FRONT_CASES, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(http_calls.calls().filter(is_short))
    def send_to_front(call: http_calls.HttpCall) -> None:
        front.check(call)

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(neighbour)
        try:
            send()
            send_to_front()
        finally:
            done.set()
        assert set(answers.result(60)) == {expected}
    assert poll(server.is_idle), server.metrics()
