# SPDX-License-Identifier: Apache-2.0
"""What a server tells of its requests: a line of JSON in its log, and OpenTelemetry spans. None has a client's text."""

from __future__ import annotations

import json
import secrets
from typing import Any

import httpx
import pytest

from lightllm_client import LightLLMClient
from tests.e2e.collector import Collector, Span
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

SECRET = "xylophone"
PROMPT = f"The {SECRET} of Japan is"


def line_of(server: TritonServer, request_id: str) -> dict[str, Any]:
    """The line that the log has of a request."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
        found[:] = [line for line in lines if line.get("request_id") == request_id]
        return bool(found)

    assert poll(is_there), server.log()
    assert len(found) == 1
    return found[0]


def trace_of(collector: Collector, trace_id: str, *names: str) -> dict[str, Span]:
    assert poll(lambda: set(names) <= collector.spans(trace_id).keys()), collector.spans(trace_id)
    return collector.spans(trace_id)


def traceparent() -> tuple[str, dict[str, str]]:
    trace_id = secrets.token_hex(16)
    return trace_id, {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}


def check_phases(spans: dict[str, Span], request_id: str, computed: int, answered: int) -> None:
    request, queue, prefill, decode = (spans[name] for name in ("request", "queue", "prefill", "decode"))
    assert {span.parent_id for span in (queue, prefill, decode)} == {request.id}
    assert request.start == queue.start <= queue.end == prefill.start <= prefill.end == decode.start <= decode.end
    assert decode.end == request.end
    facts = request.attributes
    assert facts["gen_ai.response.id"] == request_id
    assert facts["gen_ai.response.finish_reasons"] == ["length"]
    assert facts["gen_ai.usage.output_tokens"] == decode.attributes["lightllm.tokens"] == answered
    assert facts["gen_ai.usage.input_tokens"] - facts["gen_ai.usage.cache_read.input_tokens"] == computed
    assert prefill.attributes["lightllm.tokens"] == computed


def test_a_request_through_the_front_is_traced_and_logged_by_its_id(
    server: TritonServer, http: httpx.Client, collector: Collector
) -> None:
    trace_id, headers = traceparent()
    body = {"model": "x", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    body["model"] = http.get("/v1/models").json()["data"][0]["id"]
    usage = http.post("/v1/completions", json=body, headers={**headers, "x-request-id": "mine"}).json()["usage"]
    spans = trace_of(collector, trace_id, "request", "queue", "prefill", "decode", "detokenizer", "InferRequest")
    assert spans["request"].parent_id == spans["generation"].id
    steps = ("tokenizer", "generation", "detokenizer")
    assert {spans[step].parent_id for step in steps} == {spans["lightllm"].id}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    check_phases(spans, "mine", usage["prompt_tokens"] - cached, 4)

    line = line_of(server, "mine")
    assert (line["message"], line["process"], line["level"]) == ("request ended", "generation", "info")
    assert (line["status"], line["prompt_tokens"], line["cached_tokens"]) == ("length", usage["prompt_tokens"], cached)
    assert (line["answer_tokens"], line["trace_id"], line["tenant"]) == (4, trace_id, "")
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]


def test_the_unary_model_is_traced_and_untraced_requests_are_only_logged(
    server: TritonServer, client: LightLLMClient, collector: Collector
) -> None:
    trace_id, headers = traceparent()
    url = f"http://{server.http_url}/v2/models/lightllm_unary/generate"
    body = {"text_input": PROMPT, "max_tokens": 3, "ignore_eos": True, "tenant": "a"}
    with httpx.Client(trust_env=False, timeout=120) as http:
        assert http.post(url, json=body | {"id": "untraced"}).status_code == 200
        answer = http.post(url, json=body | {"id": "traced"}, headers=headers).json()
        refused = http.post(url, json=body | {"id": "wrong", "sampling_parameters": json.dumps({"min_p": SECRET})})
    assert (refused.status_code, SECRET in refused.text) == (400, True), "the error quotes the request"
    spans = trace_of(collector, trace_id, "request", "decode", "lightllm_unary")
    assert spans["request"].parent_id == spans["lightllm_unary"].id
    check_phases(spans, "traced", answer["num_input_tokens"] - answer["num_cached_tokens"], 3)
    assert spans["request"].attributes["lightllm.tenant"] == line_of(server, "traced")["tenant"] == "a"
    assert "trace_id" not in line_of(server, "untraced")
    wrong = line_of(server, "wrong")
    assert (wrong["status"], wrong["error"]) == ("rejected", "INVALID_ARG")
    assert b"untraced" not in collector.received
    assert SECRET.encode() not in collector.received
    assert SECRET not in server.log()
