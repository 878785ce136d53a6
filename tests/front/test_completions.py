# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions over a pretended engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightllm_backend.router.router import NOT_NUMBERS
from lightllm_client import Internal, InvalidArgument, Unavailable
from lightllm_client.tensors import PromptLogProbs
from tests.front.pretended import Caller, PretendedClient, chunk

PATH = "/v1/completions"
USAGE = {
    "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 3},
}  # fmt: skip
BIASES = "an object of at most 300 token ids, each with a number from -100 to 100"
PROMPTS = "text, a list of token ids, or a list of at most 2048 of either, none of them empty"


def test_the_whole_answer(call: Caller, client: PretendedClient) -> None:
    answer = call.post(PATH, {"model": "tiny", "prompt": "Hi", "max_tokens": 7}).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    assert client.calls == [("Hi", {"max_tokens": 7, "temperature": 1.0})]


def test_a_stream_is_the_same_in_parts(call: Caller) -> None:
    events = call.events(PATH, {"prompt": "Hi"})
    assert [event["choices"][0]["text"] for event in events] == ["Hel", "lo"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, "stop"]
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert all("usage" not in event for event in events)


def test_a_stream_tells_its_usage_if_asked(call: Caller) -> None:
    events = call.events(PATH, {"prompt": "Hi", "stream_options": {"include_usage": True}})
    assert [event["usage"] for event in events] == [None, None, USAGE]
    assert events[-1]["choices"] == []
    always = {"include_usage": True, "continuous_usage_stats": True}
    events = call.events(PATH, {"prompt": "Hi", "stream_options": always})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(call: Caller, client: PretendedClient, prompt: Any, prompts: list[Any], stream: bool) -> None:
    call.post(PATH, {"prompt": prompt, "stream": stream})
    assert [called for called, _ in client.calls] == prompts


def test_several_answers_of_several_prompts(call: Caller, client: PretendedClient) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "seed": 2**64 - 1, "stream_options": {"include_usage": True}}
    events = call.events(PATH, body)
    del body["stream_options"]
    client.calls.clear()
    answer = call.post(PATH, body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 10, "each prompt once"
    assert answer["usage"]["completion_tokens"] == 12
    called = [(prompt, options["seed"], options["n"]) for prompt, options in client.calls]
    assert called == [("a", 2**64 - 1, 2), ("b", 2**64 - 1, 2)], "the engine gives answer i seed + i"
    choices = [event["choices"][0] for event in events[:-1]]
    assert ["".join(one["text"] for one in choices if one["index"] == index) for index in range(4)] == ["Hello"] * 4
    assert events[-1]["usage"] == answer["usage"]


def test_more_answers_than_the_engine_makes_of_one_request(call: Caller, client: PretendedClient) -> None:
    events = call.events(PATH, {"prompt": "a", "n": 17, "seed": 3})
    assert [(options.get("n"), options["seed"]) for _, options in client.calls] == [(16, 3), (None, 19)]
    assert {event["choices"][0]["index"] for event in events} == set(range(17))


def test_fields_are_the_engine_s_options(call: Caller, client: PretendedClient) -> None:
    same = {
        "temperature": 0, "top_p": 0.5, "top_k": 3, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "stop_token_ids": [1], "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False, "priority": -1, "min_p": 0.25,
    }  # fmt: skip
    neutral = {"n": 1, "logit_bias": {}, "best_of": 1, "user": "u", "metadata": {"a": 1}, "suffix": None}
    response = call.post(PATH, {"prompt": "Hi", "stop": ["a", "b"], **same, **neutral})
    assert response.status_code == 200, response.text
    assert client.calls == [("Hi", {**same, "stop_words": ["a", "b"], "max_tokens": 16})]
    call.post(PATH, {"prompt": "Hi", "logit_bias": {"7": -100}})
    assert client.calls[-1][1]["logit_bias"] == '{"7": -100.0}'


def test_fields_without_effect(call: Caller, client: PretendedClient) -> None:
    hints = {"service_tier": "auto", "store": True, "prompt_cache_options": {"mode": "explicit"}}
    options = {"include_usage": True, "include_obfuscation": False}
    events = call.events(PATH, {"prompt": "Hi", "best_of": 1, **hints, "stream_options": options})
    assert [choice["text"] for event in events for choice in event["choices"]] == ["Hel", "lo"]
    assert client.calls == [("Hi", {"temperature": 1.0, "max_tokens": 16})]


def test_a_constraint_may_come_by_both_of_its_names(call: Caller, client: PretendedClient) -> None:
    both = {"prompt": "Hi", "guided_grammar": "start: /a/", "structured_outputs": {"grammar": "start: /a/"}}
    assert call.post(PATH, both).status_code == 200
    assert "start: /a/" in client.calls[-1][1]["structured_output"]
    for other in ({"guided_grammar": "start: /b/"}, {"guided_regex": "a"}, {"allowed_token_ids": [1]}):
        error = call.refusal(PATH, both | other)
        assert error["message"].endswith("are given together; allowed: one of them")
        assert error["param"] == next(iter(other))


@pytest.mark.parametrize("best_of", [None, 1, 2])
def test_best_of_may_be_n(call: Caller, best_of: int | None) -> None:
    answer = call.post(PATH, {"prompt": "Hi", "n": 2, "best_of": best_of}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(call: Caller, client: PretendedClient, stream: bool) -> None:
    call.post(PATH, {"prompt": "Hi", "echo": True})
    assert client.calls[0][1]["exclude_input_in_output"] is False
    body = {"prompt": "Hi", "echo": True, "max_tokens": 0}
    [answer] = call.events(PATH, body) if stream else [call.post(PATH, body).json()]
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert client.calls[-1][1]["max_tokens"] == 1, "the engine makes one at least"
    assert call.post(PATH, {"prompt": "Hi", "max_tokens": 0}).json()["usage"]["completion_tokens"] == 0


def test_log_probabilities(call: Caller, client: PretendedClient) -> None:
    client.items = [
        chunk("ab", 65, 66, log_probs=(-0.5, float("-inf"))),
        chunk("c", 67, finish_reason="stop", log_probs=(-1.5,)),
    ]
    [choice] = call.post(PATH, {"prompt": "Hi", "logprobs": 0}).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [-0.5, -9999.0, -1.5]
    assert found["top_logprobs"] is None
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [0, lengths[0], lengths[0] + lengths[1]]
    assert client.calls[0][1]["return_log_probs"] is True
    events = call.events(PATH, {"prompt": "Hi", "logprobs": 0})
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert [offset for part in offsets for offset in part] == found["text_offset"]


def test_a_model_without_logits_is_an_error_with_its_reason(call: Caller, client: PretendedClient) -> None:
    client.items = [Internal(NOT_NUMBERS.message)]
    for body in ({}, {"logprobs": 1}, {"stream": True}):
        error = call.refusal(PATH, {"prompt": "Hi", **body}, 500)
        assert error["message"] == NOT_NUMBERS.message


def test_a_log_probability_that_is_not_a_number_is_the_least(call: Caller, client: PretendedClient) -> None:
    part = chunk("a", 65, finish_reason="stop", log_probs=(float("nan"),))
    client.items = [replace(part, top_log_probs=({66: float("nan"), 67: -1.5},))]
    found = call.post(PATH, {"prompt": "Hi", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert sorted(found["top_logprobs"][0].values()) == [-9999.0, -9999.0, -1.5]


def test_the_likeliest_tokens(call: Caller, client: PretendedClient) -> None:
    part = chunk("a", 65, finish_reason="stop", log_probs=(-2.0,))
    client.items = [replace(part, top_log_probs=({66: -0.5, 67: -1.5},))]
    [choice] = call.post(PATH, {"prompt": "Hi", "logprobs": 2}).json()["choices"]
    [top] = choice["logprobs"]["top_logprobs"]
    assert list(top.values()) == [-0.5, -1.5, -2.0], "and the token itself, which is none of them"
    assert client.calls[0][1]["top_logprobs"] == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_log_probabilities_of_an_echoed_prompt(
    call: Caller, client: PretendedClient, max_tokens: int, stream: bool
) -> None:
    """What lm-evaluation-harness asks for, to compare answers by their likelihood."""
    scores = PromptLogProbs((-1.0, -2.0), (((66, -1.0),), ((7, -0.5),)))
    end = chunk("", finish_reason="length")
    last = replace(chunk("C", 67, finish_reason="length", log_probs=(-3.0,)), top_log_probs=({67: -3.0},))
    client.items = [replace(last if max_tokens else end, prompt_log_probs=scores)]
    body = {"prompt": [[65, 66, 67]], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    [answer] = call.events(PATH, body) if stream else [call.post(PATH, body).json()]
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [None, -1.0, -2.0, -3.0][: 3 + max_tokens]
    assert [top and max(top.values()) for top in found["top_logprobs"]] == [None, -1.0, -0.5, -3.0][: 3 + max_tokens]
    assert len(found["tokens"]) == len(found["text_offset"]) == 3 + max_tokens
    asked = client.calls[0][1]
    assert (asked["max_tokens"], asked["prompt_logprobs"], asked["top_logprobs"]) == (max_tokens, 1, 1)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1, "a number from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("top_p", 0, "a number above 0 and up to 1"),
        ("seed", 0.5, "a whole number from -9223372036854775808 to 18446744073709551615"),
        ("stream", "yes", "true or false"),
        ("model", 7, "a string"),
        ("logit_bias", {"a": 1}, BIASES),
        ("logit_bias", {"5": 200}, BIASES),
        ("logit_bias", {str(token): 1 for token in range(301)}, BIASES),
        ("allowed_token_ids", [], "a list of 1 to 1048576 token ids"),
        ("stop_token_ids", [0] * 33, "a list of at most 32 token ids"),
        ("guided_regex", "", "a regular expression, not empty"),
        ("guided_choice", [""], "a list of 1 to 1024 texts, none of them empty"),
        ("guided_json", "[]", "a JSON schema, as an object or as text"),
        ("guided_json", 7, "a JSON schema, as an object or as text"),
        ("max_tokens", -1, "a whole number from 0 to 2147483647"),
        ("n", True, "a whole number from 1 to 128"),
        ("prompt", "", PROMPTS),
        ("prompt", [1, "a"], PROMPTS),
        ("prompt", [-1], PROMPTS),
        ("stop", 7, "a string, or a list of at most 32 strings of at most 1024 bytes"),
        ("suffix", "end", "null (text cannot be inserted)"),
        ("best_of", 3, "1, the value of n, or null (n answers are made, and all are returned)"),
        ("best_of", "3", "a whole number"),
        ("response_format", {"type": "xml"}, "'text', 'json_object' or 'json_schema'"),
        ("stream_options", {"include_usage": False}, "null, unless stream is true"),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(call: Caller, field: str, value: Any, allowed: str) -> None:
    error = call.refusal(PATH, {"prompt": "Hi", field: value})
    assert error["param"].startswith(field)
    assert error["message"].startswith(f"{error['param']} is ")
    assert error["message"].endswith(f"; allowed: {allowed}")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "(", "json_object": False}}),
        ("guided_choice", {"guided_choice": ["a"]}),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_field(
    call: Caller, client: PretendedClient, field: str, body: dict[str, Any], stream: bool
) -> None:
    client.items = [InvalidArgument("structured_output cannot be followed: json_schema at /items: no")]
    error = call.refusal(PATH, {"prompt": "Hi", "stream": stream, **body})
    assert error["message"] == f"{field} cannot be followed: json_schema at /items: no"
    assert error["param"] == field


def test_unknown_fields_and_models(call: Caller) -> None:
    assert call.refusal(PATH, {"prompt": "Hi", "temprature": 1})["param"] == "temprature"
    assert call.refusal(PATH, {})["message"] == "prompt is missing; allowed: a value that /openapi.json describes"
    error = call.refusal(PATH, {"prompt": "Hi", "model": "gpt-4"}, status=404)
    assert (error["code"], error["message"]) == ("model_not_found", 'model is "gpt-4"; allowed: "tiny"')


def test_too_many_answers(call: Caller) -> None:
    error = call.refusal(PATH, {"prompt": ["a"] * 100, "n": 100})
    assert error["message"] == "the request asks for 10000 answers; allowed: at most 4096 (prompts times n)"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_event_is_the_status(call: Caller, client: PretendedClient, stream: bool) -> None:
    client.items = [Unavailable("the queue is full (3 requests)")]
    response = call.post(PATH, {"prompt": ["Hi", "Ho"], "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert all(one.closed for one in client.streams)


def test_a_later_error_is_an_event(call: Caller, client: PretendedClient) -> None:
    client.items = [chunk("Hel", 10), Unavailable("the engine stopped")]
    events = call.events(PATH, {"prompt": "Hi"})
    assert events[0]["choices"][0]["text"] == "Hel"
    assert events[1]["error"]["message"] == "the engine stopped"
    assert client.streams[0].closed
