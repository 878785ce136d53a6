# SPDX-License-Identifier: Apache-2.0
"""structured_output: the options of every kind of client become one text, and what is none is refused."""

import json

import pytest

from lightllm_backend.options import options_from_plain, options_to_plain, parse_request
from lightllm_backend.request import RequestError, SamplingParams
from lightllm_backend.structured_output import MAX_BYTES

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"type": "integer"}}}


def sampling_of(**options: object) -> SamplingParams:
    return parse_request({"text_input": "x"}, json.dumps(options)).options.sampling


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"structured_output": {"json_schema": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"structured_output": json.dumps({"json_schema": json.dumps(SCHEMA)})}, {"json_schema": SCHEMA}),
        ({"structured_output": {"choice": ["a", "é"]}}, {"choice": ["a", "é"]}),
        ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
        ({"guided_json": {}}, {"json_schema": {}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"regular_constraint": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {"json_schema": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json_schema": SCHEMA}),
        ({"guided_decoding": {"choice": ["a"]}}, {"choice": ["a"]}),
        ({"guided_decoding_guide_type": "json"}, {"json_object": True}),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a"}, {"regex": "a"}),
    ],
)
def test_every_way_to_ask(options, asked) -> None:
    text = sampling_of(**options).structured_output
    assert json.loads(text) == asked
    assert list(json.loads(text).get("json_schema", SCHEMA)) == list(asked.get("json_schema", SCHEMA)), "order counts"


@pytest.mark.parametrize(
    "options",
    [
        {"structured_output": ""}, {"guided_json": ""}, {"guided_choice": []}, {"response_format": {"type": "text"}},
        {"structured_outputs": {}}, {"guided_decoding": None}, {"allowed_token_ids": []},
    ],
)  # fmt: skip
def test_nothing_is_asked_for(options) -> None:
    assert not sampling_of(**options).masked


def deep(levels: int) -> str:
    """The text of a schema of so many nested objects."""
    return '{"items": ' * (levels - 1) + "{}" + "}" * (levels - 1)


def test_the_deepest_schema_asks_for_itself_again() -> None:
    text = sampling_of(guided_json=deep(63)).structured_output
    assert sampling_of(structured_output=text).structured_output == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured_output": {"regex": "a", "choice": ["b"]}}, "which has the keys regex, choice; allowed: a JSON"),
        ({"structured_output": {"\ud800": "a"}}, "which has the keys ?; allowed: a JSON"),
        ({"structured_output": 5}, "structured_output is 5, which is no object"),
        ({"structured_output": {"json_object": False}}, "whose json_object is not true"),
        ({"structured_output": {"regex": "\ud800"}}, "structured_output is "),
        ({"structured_output": {"choice": ["a"] * 1025}}, "no list of 1 to 1024 texts"),
        ({"structured_output": {"choice": "red"}}, "no list of 1 to 1024 texts"),
        ({"structured_output": {"choice": [1, 2]}}, "no list of 1 to 1024 texts"),
        ({"guided_json": "{"}, "guided_json is "),
        ({"guided_json": {"enum": ["x" * MAX_BYTES]}}, f"at most {MAX_BYTES} do; allowed: a JSON Schema"),
        ({"guided_json": "[" * 70 + "]" * 70}, "nested more than 64 levels deep"),
        ({"guided_json": deep(64)}, "which is nested more than 63 levels deep; allowed: a JSON Schema"),
        ({"guided_json": [1]}, "whose JSON Schema is no object"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex is given beside guided_json; allowed: one of them"),
        ({"guided_regex": "a", "allowed_token_ids": [3]}, "allowed_token_ids is given beside guided_regex"),
        ({"response_format": {"type": "structural_tag"}}, 'whose type is "structural_tag"; allowed: an object'),
        ({"response_format": {"type": "json_schema"}}, "which has no json_schema.schema"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, "the keys json, disable_any_whitespace"),
        ({"guided_decoding_guide_type": "structural_tag", "guided_decoding_guide": "x"}, "which is none of json, "),
        ({"guided_decoding_guide": "x"}, "guided_decoding_guide is given alone"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids is [-1], which holds -1"),
    ],
)
def test_refusals_name_the_option_and_what_is_allowed(options, message) -> None:
    with pytest.raises(RequestError) as refusal:
        sampling_of(**options)
    assert refusal.value.code == "INVALID_ARG"
    assert message in str(refusal.value)


def test_it_travels_between_the_steps() -> None:
    options = parse_request({"text_input": "x", "structured_output": '{"regex":"a"}'}).options
    assert options_from_plain(options_to_plain(options)) == options
