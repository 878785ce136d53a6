# SPDX-License-Identifier: Apache-2.0
"""LightLLM's parameters mean what they mean there, or are refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.front.lightllm.parameters import (
    LIGHTLLM_PARAMETERS,
    OWN_PARAMETERS,
    GenerateRequest,
    read_generate_request,
)
from lightllm_backend.request import RequestError

PAGE = Path(__file__).parents[3] / "docs" / "lightllm_api.md"


def read(inputs: Any = "What is AI?", **parameters: Any) -> GenerateRequest:
    return read_generate_request({"inputs": inputs, "parameters": parameters})


GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({}, GREEDY),
        ({"max_new_tokens": 17, "frequency_penalty": 1}, {**GREEDY, "max_tokens": 17, "frequency_penalty": 1.0}),
        ({"do_sample": False, "ignore_eos": True, "max_new_tokens": 16}, {**GREEDY, "ignore_eos": True}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 10}, GREEDY),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 10},
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 10},
        ),
        ({"do_sample": True, "temperature": 0}, GREEDY),
        ({"do_sample": True, "temperature": 1e-6}, GREEDY),
        ({"min_new_tokens": 1}, GREEDY),
        ({"min_new_tokens": 16}, {**GREEDY, "min_tokens": 15}),
        ({"stop_sequences": "a"}, {**GREEDY, "stop_words": ("a",)}),
        ({"stop_sequences": ["a", [7], "b"]}, {**GREEDY, "stop_words": ("a", "b"), "stop_token_ids": (7,)}),
        ({"stop_sequences": None, "repetition_penalty": 1.1}, {**GREEDY, "repetition_penalty": 1.1}),
        ({"skip_special_tokens": False, "seed": 7}, {**GREEDY, "skip_special_tokens": False, "seed": 7}),
        ({"add_spaces_between_special_tokens": False, "input_penalty": False, "group_request_id": 9}, GREEDY),
        ({"exponential_decay_length_penalty": [1, 1.0], "suggested_dp_index": -1, "print_eos_token": False}, GREEDY),
        ({"regular_constraint": "", "guided_grammar": "", "guided_json": "", "allowed_token_ids": []}, GREEDY),
    ],
)
def test_what_reaches_the_engine(parameters: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(**parameters).options == options


def test_what_does_not_reach_the_engine() -> None:
    assert read([1, 2]).prompt == (1, 2)
    asked = read(best_of=2, return_details=True, add_special_tokens=False)
    assert (asked.n, asked.return_details, asked.add_special_tokens) == (2, True, False)
    assert read_generate_request({"inputs": "a"}).n == 1
    assert read_generate_request({"inputs": "a", "multimodal_params": {"images": []}}).prompt == "a"
    assert asked.options == {**GREEDY, "n": 2, "return_log_probs": True}


def test_the_tenant_of_the_key_wins() -> None:
    body = {"inputs": "a", "parameters": {"tenant": "another"}}
    assert read_generate_request(body).options["tenant"] == "another"
    assert read_generate_request(body, "key").options["tenant"] == "key"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs is missing"),
        ({"inputs": 3}, "inputs is 3; allowed: a text, or a list of token ids"),
        ({"inputs": ""}, "inputs is"),
        ({"inputs": []}, "inputs is []; allowed"),
        ({"inputs": ["a"]}, 'inputs is ["a"]; allowed'),
        ({"inputs": "a", "stream": True}, '"stream" is not a field; allowed: inputs, parameters, multimodal_params'),
        ({"inputs": "a", "parameters": [1]}, "parameters is [1]; allowed: an object"),
        ({"inputs": "a", "multimodal_params": {"images": [{}]}}, "multimodal_params.images is [{}]; allowed: empty"),
        ({"inputs": "a", "multimodal_params": {"i" * 2000: 1}}, f"multimodal_params.{'i' * 76}… is 1; allowed: empty"),
        ({"max_tokens": 3}, '"max_tokens" is not a parameter; allowed: best_of, n, do_sample'),
        ({"n": 2}, "n is 2 and best_of is 1; allowed: the same number"),
        ({"best_of": 9}, "best_of is 9; allowed: an integer from 1 to 8"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: an integer from 1 to 2147483647"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; allowed: an integer from 1 to 2147483647"),
        ({"max_new_tokens": "many"}, 'max_new_tokens is "many"; allowed: an integer from 1 to 2147483647'),
        ({"max_new_tokens": 2**31}, "max_new_tokens is 2147483648; allowed: an integer from 1 to 2147483647"),
        ({"min_new_tokens": 0}, "min_new_tokens is 0; allowed: an integer from 1 to max_new_tokens"),
        ({"min_new_tokens": 17}, "min_new_tokens is 17; allowed"),
        ({"presence_penalty": -1}, "presence_penalty is -1.0; allowed: a number ≥ 0"),
        ({"repetition_penalty": 0.9}, "repetition_penalty is 0.9; allowed: a number ≥ 1"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1; allowed"),
        ({"do_sample": True, "top_k": 0}, "top_k is 0; allowed: -1 (off), or an integer ≥ 1"),
        ({"stop_sequences": [[7, 8]]}, "stop_sequences holds [7, 8]; allowed: texts, and lists of one token id"),
        ({"return_details": 1}, "return_details is 1; allowed: true or false"),
        ({"print_eos_token": True}, "print_eos_token is true; allowed: false"),
        ({"input_penalty": True}, "input_penalty is true; allowed: false"),
        ({"exponential_decay_length_penalty": [1, 1.1]}, "exponential_decay_length_penalty is [1, 1.1]; allowed"),
        ({"move_kv_to_decode_node": {}}, "move_kv_to_decode_node is given; allowed: null"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(body: dict[str, Any], words: str) -> None:
    if body and "inputs" not in body:
        body = {"inputs": "a", "parameters": body}
    with pytest.raises(RequestError, match=re.escape(words)) as refused:
        read_generate_request(body)
    assert refused.value.code == "INVALID_ARG"


def test_the_page_lists_every_parameter() -> None:
    _, table = PAGE.read_text(encoding="utf-8").split("\n## Parameters\n")
    listed = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(listed) == sorted((*LIGHTLLM_PARAMETERS, *OWN_PARAMETERS))
