# SPDX-License-Identifier: Apache-2.0
"""What a model's generation_config.json says of sampling counts for requests that say nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightllm_backend.front.generation_defaults import read_generation_defaults
from lightllm_backend.front.lightllm.parameters import read_generate_request
from lightllm_backend.front.state import Front
from lightllm_backend.models.errors import ModelError
from tests.front.pretended import Caller, PretendedClient

QWEN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}


def test_what_is_read(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**QWEN, "min_p": None, "eos_token_id": [1, 2], "max_new_tokens": 9}))
    assert read_generation_defaults(tmp_path) == QWEN
    for name, value in (("top_p", 1.5), ("temperature", "warm"), ("top_k", [1])):
        file.write_text(json.dumps({name: value}))
        with pytest.raises(ModelError, match=f"{name} is .*; allowed: .*; or set generation_config to none"):
            read_generation_defaults(tmp_path)
    file.write_text("[]")
    with pytest.raises(ModelError, match="holds an array; a JSON object is needed"):
        read_generation_defaults(tmp_path)


def test_requests_that_name_no_value_have_the_model_s(front: Front, client: PretendedClient) -> None:
    call = Caller(replace(front, defaults=QWEN))
    sampled = {name: value for name, value in QWEN.items() if name != "do_sample"}
    for path, body in (
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 7}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7}),
    ):
        call.post(path, body)
        assert client.calls[-1][1] == {**sampled, "max_tokens": 7}
        call.post(path, {**body, "temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": None})
        expected = {**sampled, "temperature": 0, "top_p": 1, "top_k": -1, "max_tokens": 7}
        assert client.calls[-1][1] == expected


def test_lightllm_s_api_has_them_too() -> None:
    body = {"inputs": "a", "parameters": {"top_k": 5}}
    assert read_generate_request(body, defaults=QWEN).options == {**QWEN, "top_k": 5}
    impossible = {"top_k": 0, "repetition_penalty": 0.9, "min_p": 0.1, "do_sample": True}
    assert read_generate_request({"inputs": "a"}, defaults=impossible).options == {"do_sample": True}
