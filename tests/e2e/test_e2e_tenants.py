# SPDX-License-Identifier: Apache-2.0
"""A request's tenant and priority on their way to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from lightllm_client import LightLLMClient
from tests.e2e.calls import generate, infer_grpc, infer_http
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROMPT = "Once upon a time, there was a"
RUNNING, WAITING = 4, 8  # as small_server is set up
EVENTUALLY = 30.0
REQUEST = {"text_input": "Hi", "max_tokens": 1}


def test_a_flood_leaves_another_tenant_a_place_and_the_next_turn(
    small_server: TritonServer, small_client: LightLLMClient
) -> None:
    def count(metric: str) -> float:
        return small_server.metrics()[f"lightllm_{metric}"]

    assert poll(small_server.is_idle, EVENTUALLY), small_server.metrics()
    rejected_before = count('requests_total{status="rejected"}')
    flood = []
    try:
        for size, queued in [(RUNNING, 0), (WAITING, WAITING)]:
            flood += [small_client.stream(PROMPT, max_tokens=2000, ignore_eos=True, tenant="a") for _ in range(size)]
            assert poll(lambda queued=queued: count("queued_requests") == queued, EVENTUALLY)
            assert poll(lambda: count("running_requests") == RUNNING, EVENTUALLY)
        with ThreadPoolExecutor(1) as pool:
            single = pool.submit(small_client.generate, PROMPT, max_tokens=1, tenant="b")
            assert poll(lambda: count('requests_total{status="rejected"}') == rejected_before + 1, EVENTUALLY)
            flood[0].close()
            assert single.result(EVENTUALLY).num_output_tokens == 1
            assert count("queued_requests") >= WAITING - 2, "it was not its turn"
    finally:
        for stream in flood:
            stream.close()


@pytest.mark.parametrize(
    "body",
    [{"priority": 99}, {"parameters": {"priority": 99}}, {"sampling_parameters": '{"priority": 99}'}],
    ids=["key", "parameter", "json"],
)
def test_priority_in_a_generate_request(server: TritonServer, body: Mapping[str, Any]) -> None:
    status, response = generate(server, {**REQUEST, **body})
    assert status == 400
    assert "priority is 99; allowed: an integer from -10 to 10" in response["error"]


@pytest.mark.parametrize("infer", [infer_http, infer_grpc])
def test_priority_as_an_argument_of_tritonclient_stays_with_the_server(
    server: TritonServer, infer: Callable[..., Any]
) -> None:
    """So that a request parameter has another name; the server refuses negative ones, and passes none on."""
    assert infer(server, REQUEST, priority=99)["num_output_tokens"] == 1
    with pytest.raises(InferenceServerException, match="request_priority is 99; allowed: an integer from -10 to 10"):
        infer(server, REQUEST, parameters={"request_priority": 99})
    assert infer(server, REQUEST, parameters={"request_priority": -3, "tenant": "a"})["num_output_tokens"] == 1
