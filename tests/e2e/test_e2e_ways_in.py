# SPDX-License-Identifier: Apache-2.0
"""Every way to call the server gives the same answer, with all outputs; errors have their status where there is one."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from lightllm_client import LightLLMClient
from tests.e2e.calls import GenerateStream, generate, infer_grpc, infer_http, stream_grpc
from tests.e2e.conftest import Reference
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

PROMPT = "The capital of Japan is"


@pytest.fixture(scope="module")
def expected(full_client: LightLLMClient, reference: Reference) -> dict[str, Any]:
    """The answer of four tokens, as one response."""
    answer = full_client.generate(PROMPT, max_tokens=4)
    assert reference.greedy_matches(reference.encode(PROMPT), list(answer.token_ids))
    return {
        "text_output": reference.decode(list(answer.token_ids)),
        "finish_reason": "length",
        "num_input_tokens": len(reference.encode(PROMPT)),
        "num_output_tokens": 4,
        "output_ids": list(answer.token_ids),
        "output_log_probs": [],
        "cumulative_logprob": 0.0,
        "logprobs": "null",
        "top_token_ids": [],
        "top_log_probs": [],
        "prompt_log_probs": [],
        "prompt_top_token_ids": [],
        "prompt_top_log_probs": [],
        "num_cached_tokens": len(reference.encode(PROMPT)) - 1,  # by this answer's prompt
        "sequence_index": 0,
    }


def joined(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """One response out of a stream's; over HTTP the server writes a list of one item as that item."""
    lists = {
        name: [item for one in responses for item in (one[name] if isinstance(one[name], list) else [one[name]])]
        for name in ("output_ids", "output_log_probs", "top_token_ids", "top_log_probs")
    }
    return {
        **responses[-1],
        **lists,
        "text_output": "".join(one["text_output"] for one in responses),
        "num_output_tokens": sum(one["num_output_tokens"] for one in responses),
    }


def test_http_generate(full_server: TritonServer, expected: dict[str, Any]) -> None:
    status, answer = generate(full_server, {"text_input": PROMPT, "max_tokens": 4})
    assert status == 200
    assert {name: answer[name] for name in expected} == expected


def test_http_generate_stream(full_server: TritonServer, expected: dict[str, Any]) -> None:
    stream = GenerateStream(full_server, {"text_input": PROMPT, "max_tokens": 4, "stream": True})
    assert stream.status == 200
    events = list(stream)
    assert len(events) > 1
    assert {event["finish_reason"] for event in events[:-1]} == {""}
    answer = joined(events)
    assert {name: answer[name] for name in expected} == expected


def test_http_generate_stream_of_one_response(full_server: TritonServer, expected: dict[str, Any]) -> None:
    [event] = GenerateStream(full_server, {"text_input": PROMPT, "max_tokens": 4})
    assert {name: event[name] for name in expected} == expected


def test_grpc_stream_through_our_client(full_client: LightLLMClient, expected: dict[str, Any]) -> None:
    chunks = list(full_client.stream(PROMPT, max_tokens=4))
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks) == expected["text_output"]
    assert [chunk.finish_reason for chunk in chunks] == [""] * (len(chunks) - 1) + ["length"]


@pytest.mark.parametrize("stream", [True, False])
def test_grpc_stream_through_tritonclient(full_server: TritonServer, expected: dict[str, Any], stream: bool) -> None:
    responses = stream_grpc(full_server, {"text_input": PROMPT, "max_tokens": 4, "stream": stream})
    assert (len(responses) > 1) == stream
    assert joined(responses) == expected


@pytest.mark.parametrize("infer", [infer_http, infer_grpc])
def test_unary_infer(full_server: TritonServer, expected: dict[str, Any], infer: Any) -> None:
    assert infer(full_server, {"text_input": PROMPT, "max_tokens": 4}) == expected


def test_unary_infer_ignores_stream(full_server: TritonServer, expected: dict[str, Any]) -> None:
    assert infer_grpc(full_server, {"text_input": PROMPT, "max_tokens": 4, "stream": True}) == expected


def test_unary_generate(full_server: TritonServer, expected: dict[str, Any]) -> None:
    status, answer = generate(full_server, {"text_input": PROMPT, "max_tokens": 4}, model="lightllm_unary")
    assert status == 200
    assert {name: answer[name] for name in expected} == expected


def test_token_ids_as_the_prompt(full_client: LightLLMClient, reference: Reference, expected: dict[str, Any]) -> None:
    answer = full_client.generate(reference.encode(PROMPT), max_tokens=4)
    assert answer.text == expected["text_output"]
    assert answer.num_input_tokens == expected["num_input_tokens"]


def test_lightllms_own_call(full_server: TritonServer, reference: Reference) -> None:
    body = b'{"inputs":"What is AI?","parameters":{"max_new_tokens":17,"frequency_penalty":1}}'
    status, answer = generate(full_server, body)
    assert status == 200
    assert answer["num_output_tokens"] == 17
    assert answer["text_output"] == reference.decode(answer["output_ids"])


def test_direct_call_of_generation(full_server: TritonServer, expected: dict[str, Any], reference: Reference) -> None:
    """Without a detokenizer nobody gives credit back; the stream must not wait for it."""
    values = {"input_ids": reference.encode(PROMPT), "sampling_parameters": '{"max_tokens": 4, "stream": true}'}
    responses = stream_grpc(full_server, values, model="generation")
    assert [token_id for one in responses for token_id in one["output_ids"]] == expected["output_ids"]


def test_unary_calls_have_real_status_codes(full_server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARG: top_p is 0.0") as refused:
        infer_http(full_server, {"text_input": PROMPT, "top_p": 0.0})
    assert refused.value.status() == "400"
    with pytest.raises(InferenceServerException, match="INVALID_ARG: top_p is 0.0") as refused:
        infer_grpc(full_server, {"text_input": PROMPT, "top_p": 0.0})
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
