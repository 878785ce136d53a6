# SPDX-License-Identifier: Apache-2.0
"""Each option, by each of the three ways in which it may come, does the same, and something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.calls import generate, in_parallel, stream_grpc
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

STORY = "Once upon a time, there was a"
COUNTING = "1 1 1 1 1 1 1 1"
CHAT = (
    "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\nThe capital of Japan is Tokyo."
)
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 1.5}

# The option, a value, and a request on which that value shows.
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("max_tokens", 3, {"text_input": STORY}),
    ("do_sample", True, {"text_input": STORY, "seed": 3}),
    ("temperature", 3.0, {"text_input": STORY, "do_sample": True, "seed": 3}),
    ("top_p", 0.01, {"text_input": STORY, **SAMPLED}),
    ("top_k", 1, {"text_input": STORY, **SAMPLED}),
    ("min_p", 1.0, {"text_input": STORY, **SAMPLED}),
    ("logit_bias", '{"19081": 100}', {"text_input": STORY}),
    ("seed", 2**64 - 1, {"text_input": STORY, "do_sample": True, "temperature": 3.0}),
    ("presence_penalty", 20.0, {"text_input": COUNTING}),
    ("frequency_penalty", 20.0, {"text_input": COUNTING}),
    ("repetition_penalty", 5.0, {"text_input": COUNTING}),
    ("min_tokens", 5, {"text_input": COUNTING, "stop_words": "1"}),
    ("ignore_eos", True, {"text_input": CHAT}),
    ("stop_words", "1", {"text_input": COUNTING}),
    ("stop_token_ids", [19081], {"text_input": "The capital of Japan is"}),
    ("exclude_input_in_output", False, {"text_input": STORY}),
    ("parse_special", False, {"text_input": CHAT}),
    ("skip_special_tokens", False, {"text_input": CHAT, "ignore_eos": True}),
    ("return_log_probs", True, {"text_input": STORY}),
    ("top_logprobs", 2, {"text_input": STORY}),
    ("stream", True, {"text_input": STORY}),
]
ALIASES = [
    ("max_new_tokens", "max_tokens", 3, STORY),
    ("stop", "stop_words", "1", COUNTING),
    ("stop_sequences", "stop_words", '["7", "1"]', COUNTING),
    ("min_new_tokens", "min_tokens", 3, COUNTING),
    ("logprobs", "top_logprobs", 2, STORY),
    ("return_logprobs", "return_log_probs", True, STORY),
    ("return_details", "return_log_probs", True, STORY),
    ("streaming", "stream", True, STORY),
]


def answer(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client has of an answer in the end, and whether it came in pieces."""
    assert responses[-1]["finish_reason"] in ("stop", "length")
    return {
        "streamed": len(responses) > 1,
        "text": "".join(one["text_output"] for one in responses),
        "ids": [token_id for one in responses for token_id in one["output_ids"]],
        "has_log_probs": any(one["output_log_probs"] for one in responses),
        "top_token_ids": [token_id for one in responses for token_id in one["top_token_ids"]],
        "num_input_tokens": responses[-1]["num_input_tokens"],
    }


@pytest.fixture(scope="module")
def answers(full_server: TritonServer) -> dict[str, list[dict[str, Any]]]:
    """To each case, all at once: without the option, then with it as a tensor, in the JSON, and as a parameter."""

    def ask(name: str, value: Any, base: dict[str, Any]) -> list[dict[str, Any]]:
        request = {"max_tokens": 6, **base}
        default = {key: kept for key, kept in request.items() if key != name}
        in_json = {**default, "sampling_parameters": json.dumps({name: value})}
        return in_parallel(
            [
                lambda: answer(stream_grpc(full_server, request if name == "max_tokens" else default)),
                lambda: answer(stream_grpc(full_server, {**default, name: value})),
                lambda: answer(stream_grpc(full_server, in_json)),
                lambda: answer(stream_grpc(full_server, default, parameters={name: _parameter(value)})),
            ]
        )

    answers = in_parallel([lambda case=case: ask(*case) for case in CASES])
    return {name: answered for (name, *_), answered in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_three_ways(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    without, tensor, in_json, parameter = answers[name]
    assert tensor == in_json == parameter
    assert tensor != without, f"{name} has no effect"


@pytest.fixture(scope="module")
def aliased(full_server: TritonServer) -> dict[str, list[dict[str, Any]]]:
    """To each alias, all at once: with the option's own name, then with the alias."""

    def ask(alias: str, name: str, value: Any, prompt: str) -> list[dict[str, Any]]:
        base = {"text_input": prompt, "max_tokens": 4}
        base.pop(name, None)
        parameters = [{spelling: _parameter(value)} for spelling in (name, alias)]
        return in_parallel(
            [lambda given=given: answer(stream_grpc(full_server, base, parameters=given)) for given in parameters]
        )

    answers = in_parallel([lambda case=case: ask(*case) for case in ALIASES])
    return {alias: answered for (alias, *_), answered in zip(ALIASES, answers, strict=True)}


@pytest.mark.parametrize("alias", [alias[0] for alias in ALIASES])
def test_aliases(aliased: dict[str, list[dict[str, Any]]], alias: str) -> None:
    by_name, by_alias = aliased[alias]
    assert by_name == by_alias


def _parameter(value: Any) -> Any:
    """As tritonclient takes it: whole numbers, booleans and strings; the largest numbers and fractions as strings."""
    if isinstance(value, float) or (not isinstance(value, bool) and isinstance(value, int) and value >= 2**63):
        return str(value)
    return json.dumps(value) if isinstance(value, list) else value


def test_a_tensor_wins_over_the_json_and_that_over_parameters(full_server: TritonServer) -> None:
    base = {"text_input": STORY}
    in_json = {**base, "sampling_parameters": '{"max_tokens": 3}'}
    calls: list[tuple[dict[str, Any], dict[str, int], int]] = [
        ({**in_json, "max_tokens": 2}, {"max_tokens": 4}, 2),
        (in_json, {"max_tokens": 4}, 3),
        (in_json, {"max_new_tokens": 4}, 3),
        (base, {"max_tokens": 4}, 4),
    ]
    answers = in_parallel(
        [
            lambda asked=asked, given=given: stream_grpc(full_server, asked, parameters=given)
            for asked, given, _ in calls
        ]
    )
    assert [len(answer(responses)["ids"]) for responses in answers] == [count for *_, count in calls]


def test_defaults(full_server: TritonServer) -> None:
    [response] = stream_grpc(full_server, {"text_input": STORY})
    assert response["num_output_tokens"] == 16
    assert response["output_log_probs"] == []
    assert not response["text_output"].startswith(STORY)


def test_temperature_zero_is_greedy_whatever_else_is_said(full_server: TritonServer) -> None:
    base = {"text_input": STORY, "max_tokens": 6}
    greedy = answer(stream_grpc(full_server, base))
    assert answer(stream_grpc(full_server, {**base, "temperature": 0.0, "do_sample": True, "top_k": 50})) == greedy


def test_numbers_may_be_strings_and_reserved_names_are_ignored(full_server: TritonServer) -> None:
    status, response = generate(
        full_server,
        {
            "text_input": STORY,
            "sampling_parameters": '{"max_tokens": "3", "n": "1", "ignore_eos": "true"}',
            "parameters": {"best_of": 1, "sequence_note": "x", "return_finish_reason": True},
        },
    )
    assert status == 200, response
    assert response["num_output_tokens"] == 3
