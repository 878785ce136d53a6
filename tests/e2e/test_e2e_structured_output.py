# SPDX-License-Identifier: Apache-2.0
"""Structured output through the whole server: documents, choices, and what is refused."""

from __future__ import annotations

import json

import pytest
from tritonclient.utils import InferenceServerException

from lightllm_client import LightLLMClient
from tests.e2e.calls import in_parallel, infer_grpc
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_documents_follow_their_schema_beside_a_request_without_one(client: LightLLMClient) -> None:
    alone = client.generate("Once upon a time", max_tokens=8)
    asked = json.dumps({"json_schema": PERSON})
    *documents, free = in_parallel(
        [
            lambda seed=seed: client.generate(
                "A person: ", structured_output=asked, seed=seed, temperature=1.2, max_tokens=80
            )
            for seed in range(2)
        ]
        + [lambda: client.generate("Once upon a time", max_tokens=8)]
    )
    assert free.token_ids == alone.token_ids
    for document in documents:
        assert document.finish_reason == "stop"
        assert json.loads(document.text).keys() == PERSON["properties"].keys()


def test_several_answers_to_one_choice(client: LightLLMClient) -> None:
    asked = json.dumps({"choice": ["red", "green", "blue"]})
    answers = client.generate_several("A colour: ", structured_output=asked, n=4, temperature=2.0, seed=1)
    assert {one.text for one in answers} <= {"red", "green", "blue"}
    assert {one.finish_reason for one in answers} == {"stop"}


def test_a_schema_that_cannot_be_followed_is_refused_with_its_place(server: TritonServer) -> None:
    schema = {"properties": {"tags": {"type": "array", "uniqueItems": True}}}
    body = {"text_input": "x", "structured_output": json.dumps({"json_schema": schema})}
    with pytest.raises(InferenceServerException, match="json_schema at /properties/tags: .*uniqueItems"):
        infer_grpc(server, body)
