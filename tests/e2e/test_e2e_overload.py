# SPDX-License-Identifier: Apache-2.0
"""More than the server can take: the excess is refused where it comes in, and counted; neighbours go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from lightllm_client import LightLLMClient
from tests.e2e.calls import generate
from tests.e2e.launch_command import flood
from tests.e2e.server import TritonServer, executions
from tests.polling import poll

pytestmark = pytest.mark.e2e

REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "a wrong option": ("lightllm", {"text_input": "a", "top_p": 7.0}),
    "a text that cannot fit": ("lightllm", {"text_input": "a" * 900_000}),
    "too many ids": ("lightllm", {"input_ids": [5] * 9000}),
    "too long in all": ("lightllm", {"text_input": "a", "max_tokens": 9000}),
    "too long for the unary model": ("lightllm_unary", {"text_input": "a", "max_tokens": 9000}),
}


def ended(server: TritonServer) -> dict[str, float]:
    statuses = ("rejected", "failed", "length")
    metrics = server.metrics()
    return {status: metrics[f'lightllm_requests_total{{status="{status}"}}'] for status in statuses}


def grown(server: TritonServer, before: dict[str, float], **by: int) -> Callable[[], bool]:
    return lambda: ended(server) == {status: count + by.get(status, 0) for status, count in before.items()}


@pytest.fixture(autouse=True)
def idle_before(small_server: TritonServer) -> None:
    assert poll(small_server.is_idle), small_server.metrics()


def test_refusals_count_as_rejected(small_server: TritonServer) -> None:
    before = ended(small_server)
    for model, body in REFUSALS.values():
        assert generate(small_server, body, model)[0] == 400
    assert poll(grown(small_server, before, rejected=len(REFUSALS))), (before, ended(small_server))


def test_the_excess_of_a_flood_is_refused_at_the_first_step(
    small_server: TritonServer, small_client: LightLLMClient
) -> None:
    before, reached = ended(small_server), executions(small_server.http_port, "generation")
    running = small_client.stream("Once upon a time", max_tokens=60, ignore_eos=True)
    next(running)
    count = 300
    statuses = asyncio.run(flood(small_server.http_port, count, max_tokens=20, seconds=120))
    assert sum(statuses.values()) == statuses["200"] + statuses["400"] == count
    assert statuses["200"] >= 8, "the queue was used"
    assert sum(chunk.num_output_tokens for chunk in running) == 59, "what runs is not disturbed"
    answered = {"length": statuses["200"] + 1, "rejected": statuses["400"]}
    assert poll(grown(small_server, before, **answered)), (before, answered, ended(small_server))
    assert executions(small_server.http_port, "generation") - reached < statuses["200"] + count / 4, (
        "few travelled on in vain"
    )


def test_long_prompts_do_not_hold_up_short_ones(small_server: TritonServer) -> None:
    before, count = ended(small_server), 5
    long = {"text_input": "the quick brown fox " * 30_000}  # 600 kB that might fit, by their bytes alone
    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(generate, small_server, long) for _ in range(count)]
        for model in ("lightllm", "lightllm_unary"):
            assert generate(small_server, {"text_input": "Hi", "max_tokens": 1}, model)[0] == 200
        waiting = wait(calls, timeout=0).not_done
        assert waiting, "it did not wait for all of them"
        answers = [call.result(120) for call in calls]
    assert {status for status, _ in answers} == {400}
    assert all("allowed: at most 8191 prompt tokens" in answer["error"] for _, answer in answers)
    assert poll(grown(small_server, before, rejected=count, length=2)), (before, ended(small_server))
