# SPDX-License-Identifier: Apache-2.0
"""The interface table: every name, alias, type and limit; the three sources; what a refusal says."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.option_table import ALL_OPTIONS, OPTIONS, OTHERS
from lightllm_backend.options import (
    check_lengths,
    check_prompt_bytes,
    check_token_ids,
    fitted,
    options_from_plain,
    options_to_plain,
    parse_request,
)
from lightllm_backend.request import AS_MANY_AS_FIT, Request, RequestError, RequestOptions, SamplingParams


def sampling(**values: Any) -> SamplingParams:
    return parse_request({"text_input": "a", **values}).options.sampling


def refusal(tensors: dict[str, Any], sampling_parameters: str | None = None, parameters: Any = None) -> str:
    with pytest.raises(RequestError) as error:
        parse_request(tensors, sampling_parameters, parameters)
    assert error.value.code == "INVALID_ARG"
    assert "allowed: " in error.value.message
    return error.value.message


def test_defaults_but_for_the_seed_which_is_drawn() -> None:
    parsed = parse_request({"text_input": "a"})
    assert (parsed.text, parsed.token_ids) == ("a", None)
    drawn = parsed.options.sampling.seed
    assert parsed.options == RequestOptions(SamplingParams(seed=drawn))
    assert len({sampling().seed for _ in range(4)}) == 4
    assert all(0 <= sampling().seed < 2**64 for _ in range(4))


# Names and aliases

GIVEN = {
    "max_tokens": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25,
    "presence_penalty": 0.25, "frequency_penalty": -0.25, "repetition_penalty": 1.5, "seed": 9, "min_tokens": 2,
    "ignore_eos": True, "logit_bias": ((5, -100.0), (7, 1.5)), "stop_words": ("x", "y"),
    "stop_token_ids": (7, 0), "return_log_probs": True, "top_logprobs": 4, "prompt_logprobs": 4, "n": 3,
    "structured_output": '{"regex":"a|b"}', "allowed_token_ids": (5, 9),
}  # fmt: skip


def test_every_field_of_sampling_params_is_an_option() -> None:
    assert set(GIVEN) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("name", GIVEN)
def test_each_name_and_alias_sets_its_field(name: str) -> None:
    for alias in (name, *OPTIONS[name].other_names):
        assert getattr(sampling(**{alias: GIVEN[name]}), name) == GIVEN[name]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("inputs", "text_input"), ("streaming", "stream"), ("max_new_tokens", "max_tokens"), ("random_seed", "seed"),
        ("min_length", "min_tokens"), ("min_new_tokens", "min_tokens"), ("stop", "stop_words"),
        ("stop_sequences", "stop_words"), ("stop_ids", "stop_token_ids"), ("return_logprobs", "return_log_probs"),
    ],
)  # fmt: skip
def test_the_aliases_of_other_servers_are_known(alias: str, name: str) -> None:
    assert alias in OPTIONS[name].other_names


def test_a_name_stands_for_one_option() -> None:
    names = [name for first, option in ALL_OPTIONS.items() for name in (first, *option.other_names)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["stream", "exclude_input_in_output", "parse_special", "skip_special_tokens"])
def test_options_outside_of_sampling(name: str) -> None:
    for value in (True, False):
        assert getattr(parse_request({"text_input": "a", name: value}).options, name) is value


def test_inputs_is_text_input_and_lightllm_s_body_is_understood() -> None:
    parsed = parse_request({"inputs": "What is AI?"}, None, {"max_new_tokens": 17, "frequency_penalty": 1})
    assert parsed.text == "What is AI?"
    assert parsed.options.sampling.max_tokens == 17
    assert parsed.options.sampling.frequency_penalty == 1.0


def test_token_ids_instead_of_text() -> None:
    assert parse_request({"input_ids": [3, 1, 2]}).token_ids == (3, 1, 2)
    assert parse_request({}, json.dumps({"input_ids": [3, 1, 2]})).token_ids == (3, 1, 2)
    assert parse_request({}, None, {"input_ids": "[3, 1, 2]"}).token_ids == (3, 1, 2)
    assert refusal({"input_ids": []}).startswith("input_ids is []")
    assert refusal({}, '{"input_ids": [1, "a"]}').startswith("input_ids is ")
    assert refusal({}, '{"input_ids": 3}').startswith("input_ids is 3")
    for wrong in (4294967299, -1):
        message = refusal({"input_ids": [*range(100), wrong, 5]})
        assert message.startswith("input_ids is [0, 1, 2, ")
        assert message.endswith(
            f", which holds {wrong}; allowed: a list of 1 to 1048576 ids of the model's vocabulary, ≥ 0"
        )
    assert "which holds 1048577 ids; allowed: " in refusal({"input_ids": [1] * (2**20 + 1)})


def test_best_of_is_n() -> None:
    assert sampling(n=3, best_of=3).n == 3
    assert sampling(best_of=1).n == 1
    assert refusal({"text_input": "a", "n": 2, "best_of": 3}) == "best_of is 3; allowed: the value of n (2)"


def test_exactly_one_prompt() -> None:
    assert refusal({}).startswith("none of text_input and input_ids given")
    assert refusal({"text_input": "a", "input_ids": [1]}).startswith("both of text_input and input_ids given")


# Values and limits


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("prompt_logprobs", [0, 20, -1, "7", 7.0, True, "false"], [21, -2, 1.5, "x", [1], {}, ""]),
        ("n", [1, 16, "2", 4.0], [0, 17, -1, 1.5, "x", True, [1]]),
        ("max_tokens", [1, -1, 2**31 - 1, "7", " 7 ", 7.0], [0, -2, 2**31, 1.5, "7.5", "x", True, [1], {}]),
        ("temperature", [0, 0.0, 2, "0.5", 1e-9], [-0.1, float("nan"), float("inf"), "x", "nan", True, [0.5]]),
        ("top_p", [1e-6, 1, "0.5"], [0, -0.5, 1.5, float("nan"), float("inf"), "x", False]),
        ("top_k", [-1, 0, 1, "40", 3.0], [-2, 0.5, "x", True, 2**31]),
        ("min_p", [0, 1, "0.5"], [-0.1, 1.5, float("nan"), "x", True]),
        ("presence_penalty", [-2.0, 0, "1.5"], [float("nan"), float("inf"), float("-inf"), "x", 10**400]),
        ("frequency_penalty", [-2.0, 0, "1.5"], [float("nan"), float("inf"), float("-inf"), "x", [1]]),
        ("repetition_penalty", [0.5, 1, "2"], [0, -1, float("nan"), float("inf"), "x"]),
        ("seed", [-1, 0, 2**64 - 1, "12", str(2**64 - 1), 2.0**53], [-2, 2**64, 0.5, "x", "9" * 30, 2.0**60]),
        ("end_id", [-1, 0, 2, "2"], [-2, 2**31, "x", 0.5]),
        ("stop_token_ids", [[], [0], [1, "2"], [7] * 32, "[1, 2]"], [[7] * 33, [-1], [2**31], ["a"], 3, "x", {}]),
        (
            "logit_bias",
            [
                {},
                {"5": -100},
                {5: 100.0},
                '{"5": "1.5", "0": 0}',
                [],
                [[5, 1]],
                "[[5, 1], [6, -1]]",
                [(2**31 - 1, 0.5)],
            ],
            [
                {"5": 100.5},
                {"5": -101},
                {"-1": 1},
                {"x": 1},
                {str(2**31): 1},
                {"5": None},
                {"5": float("nan")},
                5,
                "x",
                [5, 1],
                [[5]],
                [[5, 1, 2]],
                ["51"],
                [[5, 1], [5, 2]],
                {"5": 1, "05": 2},
                dict.fromkeys(range(301), 1),
            ],
        ),
        ("ignore_eos", [True, 0, 1, "true", "False", " 1 "], [2, -1, "yes", [True], 0.5]),
        ("best_of", [1], [2]),
        ("beam_width", [1], [4]),
        ("num_return_sequences", [1, 3], [0, 17]),
        ("logprobs", [0, 1, 20, True, "3", 2.0], [-1, 21, 0.5, "many", [1]]),
        ("top_logprobs", [0, 20, "3"], [-1, 21, True, 0.5]),
        ("return_finish_reason", [True, "false"], ["x", 3]),
    ],
)
def test_limits(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        parse_request({"text_input": "a"}, None, {name: value})
    for value in bad:
        message = refusal({"text_input": "a"}, None, {name: value})
        assert message.startswith(f"{name} is ")


@pytest.mark.parametrize(("text", "value"), [("5", 5), ("0.5", 0.5), ("true", True)])
def test_numbers_may_be_strings(text: str, value: Any) -> None:
    names = {5: "top_k", 0.5: "top_p", True: "ignore_eos"}
    assert getattr(sampling(**{names[value]: text}), names[value]) == value


@pytest.mark.parametrize(
    ("asked", "returned"),
    [
        # As in OpenAI's completions and in vLLM (SamplingParams of 0.6 and newer), 0 asks for the sampled token's.
        *(({"logprobs": count}, True) for count in (0, 1, 5, "0", "1", 0.0, True, "true")),
        *(({"logprobs": no}, False) for no in (False, "false")),
        *(({"return_log_probs": no}, False) for no in (False, 0, "0")),
        *(({"return_log_probs": yes}, True) for yes in (True, 1, "1", 2)),
        ({"return_cumulative_logprob": True}, True),
        ({"return_details": True}, True),
        ({"return_details": False}, False),
        # vllm_backend gives no output `logprobs` unless return_logprobs asks for it.
        ({"return_logprobs": False, "logprobs": 5}, False),
        ({"return_logprobs": True, "logprobs": 5}, True),
        ({"return_logprobs": False, "return_cumulative_logprob": True}, True),
        ({}, False),
    ],
)
def test_who_asks_for_log_probabilities(asked: dict[str, Any], returned: bool) -> None:
    parsed = parse_request({"text_input": "a"}, json.dumps(asked))
    assert parsed.options.sampling.return_log_probs is returned


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"top_logprobs": 3}, 3),
        *(({"logprobs": one}, count) for one, count in ((5, 5), ("1", 1), (0, 0), (True, 0), (False, 0))),
        ({"logprobs": 5, "top_logprobs": 2}, 2),
        ({"logprobs": 5, "return_log_probs": True}, 5),
        ({"logprobs": 5, "return_log_probs": False}, 0),
        ({"top_logprobs": 2, "return_log_probs": False}, 2),
        ({"return_log_probs": 5}, 0),
    ],
)
def test_who_asks_for_the_likeliest_tokens(asked: dict[str, Any], count: int) -> None:
    parsed = parse_request({"text_input": "a"}, json.dumps(asked)).options.sampling
    assert parsed.top_logprobs == count
    assert parsed.return_log_probs or not count


def test_min_tokens_may_not_be_more_than_max_tokens() -> None:
    assert sampling(min_tokens=4, max_tokens=4).min_tokens == 4
    refused = refusal({"text_input": "a", "min_length": 5}, None, {"max_new_tokens": 4})
    assert refused == "min_length is 5; allowed: from 0 to max_new_tokens (4)"
    assert "max_tokens (16)" in refusal({"text_input": "a", "min_tokens": 17})


def test_end_id_is_a_stop_token_id_and_minus_one_ignores_eos() -> None:
    """`end_id` of tensorrtllm_backend; -1 there: no token ends the request."""
    assert sampling(end_id=2).stop_token_ids == (2,)
    assert sampling(end_id=2, stop_ids=[5, 7]).stop_token_ids == (5, 7, 2)
    assert not sampling(end_id=2).ignore_eos
    assert (sampling(end_id=-1).ignore_eos, sampling(end_id=-1).stop_token_ids) == (True, ())
    refused = refusal({"text_input": "a", "end_id": 2, "stop_token_ids": [7] * 32})
    assert refused == "stop_token_ids and end_id are 33 ids; allowed: 32"


def test_a_seed_of_minus_one_is_drawn() -> None:
    assert len({sampling(seed=-1).seed for _ in range(4)}) == 4


@pytest.mark.parametrize("value", [2.0**53 + 2, float(2**64 - 1)])
def test_a_double_that_stands_for_several_integers_is_refused_with_the_reason(value: float) -> None:
    """Triton server 2.51 passes an integer above 2**63 - 1 that is an HTTP request parameter as a double."""
    message = refusal({"text_input": "a"}, None, {"random_seed": value})
    assert message.startswith(f"random_seed is {value}, which came as a double, and above 2⁵³")


@pytest.mark.parametrize(("value", "why"), [(1e39, "too large"), (-1e39, "too large"), (1e-50, "which is 0")])
def test_a_number_that_32_bits_do_not_hold_is_refused_with_the_reason(value: float, why: str) -> None:
    message = refusal({"text_input": "a"}, json.dumps({"frequency_penalty": value}))
    assert message.startswith(f"frequency_penalty is {value}, which ")
    assert why in message
    assert "32-bit floating point; allowed: a finite number" in message


def options_of(convert: str) -> list[str]:
    return [name for name, option in OPTIONS.items() if option.convert.__name__ == convert]


@pytest.mark.parametrize("name", options_of("integer"))
def test_the_bounds_that_are_stated_for_integers_are_the_real_ones(name: str) -> None:
    option = OPTIONS[name]
    others, _, bounds = option.allowed.partition("an integer from ")
    least, most = (int(bound) for bound in bounds.split(" to "))
    special = [int(value) for value in re.findall(r"-?\d+", others)]
    for value in (*range(least - 3, least + 2), most - 1, most, most + 1, most + 2):
        assert option.holds(option.convert(value)) is (least <= value <= most or value in special), value


STATED: dict[str, Callable[[float], bool]] = {
    "a finite number": math.isfinite,
    "a finite temperature ≥ 0": lambda value: 0 <= value < math.inf,
    "a finite number > 0": lambda value: 0 < value < math.inf,
    "0 < top_p ≤ 1": lambda value: 0 < value <= 1,
    "0 ≤ min_p ≤ 1": lambda value: 0 <= value <= 1,
}


@pytest.mark.parametrize("name", options_of("number"))
def test_the_bounds_that_are_stated_for_numbers_are_the_real_ones(name: str) -> None:
    option = OPTIONS[name]
    for value in (-math.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 0.5, 1.0, 1 + 2**-40, 3e38, math.inf, math.nan):
        assert option.holds(option.convert(value)) is STATED[option.allowed](value), value


@pytest.mark.parametrize("name", OTHERS)
def test_what_can_mean_nothing_here_is_neutral_or_refused_with_a_reason(name: str) -> None:
    option = OTHERS[name]
    allowed = re.fullmatch(r"(?P<value>.*) \((?P<reason>[^()]+)\)", option.allowed)
    assert allowed, "the text says what is allowed and why"
    neutral, others = NEUTRAL[allowed["value"]]
    for key in (name, *option.other_names):
        for value in neutral:
            before = parse_request({"text_input": "a"}, json.dumps({"seed": 1}))
            assert parse_request({"text_input": "a"}, json.dumps({"seed": 1, key: value})) == before
        for value in others:
            message = refusal({"text_input": "a"}, json.dumps({key: value}))
            assert message.startswith(f"{key} is ")
            assert message.endswith(f"allowed: {option.allowed}")


# By what is said to be allowed: values that are, and values that are not.
NEUTRAL: dict[str, tuple[list[Any], list[Any]]] = {
    "the value of n": ([1, "1"], [0, 17, "x"]),
    "true or false": ([True, False, "true", None], [2, "x", [True]]),
    "true": ([True, 1, "true", None], [False, 0, "x"]),
    "false": ([False, 0, "false", None], [True, 1, "x", 2]),
    "0": ([0, "0", None], [1, 0.5, "x"]),
    "0.0": ([0, 0.0, "0", None], [0.1, "x", True]),
    "1": ([1, "1", None], [0, 2, "x"]),
    "-1": ([-1, None], [0, 2, "x"]),
    "any number": ([0.5, 1, None], ["x", True]),
    "any integer": ([-1, 0, 50256, None], ["x", 0.5]),
    "empty": (["", [], None], ["x", ["x"], 3]),
    "null": ([None], ["", 0, 1, -1]),
    "[any, 1.0]": ([[1, 1.0], [5, 1], None], [[1, 1.5], [1], 1.0, "x"]),
}


@pytest.mark.parametrize(
    ("values", "do_sample"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 4}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
    ],
)
def test_do_sample_follows_from_what_is_given(values: dict[str, Any], do_sample: bool) -> None:
    assert sampling(**values).do_sample is do_sample


def test_temperature_zero_is_greedy_whatever_else_is_said() -> None:
    assert sampling(temperature=0, do_sample=True, top_p=0.5).greedy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a", "b"], ("a", "b")),
        (["", "b", ""], ("b",)),
        ("a", ("a",)),
        ('["a", "b"]', ("a", "b")),
        ("[INST]", ("[INST]",)),
        ("[1, 2]", ("[1, 2]",)),
        ([], ()),
        (["é" * 512], ("é" * 512,)),
        (["w"] * 32, ("w",) * 32),
    ],
)
def test_stop_words(given: Any, words: tuple[str, ...]) -> None:
    assert sampling(stop_words=given).stop_words == words


@pytest.mark.parametrize("given", [["w"] * 33, ["é" * 513], [1], 3, {"a": 1}, ["\ud800"]])
def test_refused_stop_words(given: Any) -> None:
    assert refusal({"text_input": "a"}, json.dumps({"stop": given})).startswith("stop is ")


def test_text_that_is_empty_or_no_text() -> None:
    assert refusal({"text_input": ""}) == 'text_input is ""; allowed: a string that is not empty'
    assert refusal({}, '{"text_input": 3}').startswith("text_input is 3")
    assert refusal({}, '{"text_input": "\\ud800"}').startswith("text_input is ")


# Sources


def test_a_tensor_wins_over_json_and_json_over_parameters() -> None:
    parsed = parse_request(
        {"text_input": "a", "top_k": 1},
        json.dumps({"top_k": 2, "max_new_tokens": 2, "seed": 2}),
        {"top_k": 3, "max_tokens": 3, "random_seed": 3, "min_tokens": 1},
    )
    chosen = parsed.options.sampling
    assert (chosen.top_k, chosen.max_tokens, chosen.seed, chosen.min_tokens) == (1, 2, 2, 1)


def test_a_value_that_loses_is_checked_all_the_same() -> None:
    assert "top_p is 2" in refusal({"text_input": "a", "top_p": 0.5}, '{"top_p": 2}')


def test_the_json_may_be_a_request_parameter() -> None:
    json_text = '{"max_tokens": 3}'
    assert parse_request({"text_input": "a"}, None, {"sampling_parameters": json_text}).options.sampling.max_tokens == 3
    parsed = parse_request({"text_input": "a"}, '{"max_tokens": 5}', {"sampling_parameters": json_text, "top_k": 7})
    assert (parsed.options.sampling.max_tokens, parsed.options.sampling.top_k) == (5, 7), "the tensor's JSON wins"
    with pytest.raises(RequestError, match="sampling_parameters is 3; allowed: the text of a JSON object"):
        parse_request({"text_input": "a"}, None, {"sampling_parameters": 3})


def test_null_is_not_given() -> None:
    parsed = parse_request({"text_input": "a"}, '{"max_tokens": null, "no_such": null}', {"max_tokens": 4})
    assert parsed.options.sampling.max_tokens == 4


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_no_json_at_all(text: str | None) -> None:
    assert parse_request({"text_input": "a"}, text).options.sampling.max_tokens == 16


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"a"', "null"])
def test_json_that_is_no_object(text: str) -> None:
    assert refusal({"text_input": "a"}, text).startswith("sampling_parameters is ")


def test_two_names_for_one_value_in_one_source() -> None:
    message = refusal({"text_input": "a"}, '{"max_tokens": 1, "max_new_tokens": 2}')
    assert message == "max_new_tokens is given beside max_tokens; allowed: one of max_tokens, max_new_tokens"


@pytest.mark.parametrize(
    "name",
    ["id", "timeout", "binary_data_output", "sequence_id", "sequence_start", "triton_enable_empty_final"],
)
def test_the_server_s_own_parameters_are_ignored_there_and_nowhere_else(name: str) -> None:
    parse_request({"text_input": "a"}, None, {name: "anything"})
    assert refusal({"text_input": "a"}, json.dumps({name: 1})).startswith(f"{name} is not a parameter")


def test_an_unknown_name_gets_a_hint_and_the_list() -> None:
    message = refusal({"text_input": "a"}, None, {"temprature": 1})
    assert message.startswith("temprature is not a parameter (did you mean temperature?); allowed: ")
    assert all(name in message for name in OPTIONS)
    assert not any(name in message for name in OTHERS if len(name) > 2), "they are of no use"
    assert "did you mean" not in refusal({"text_input": "a"}, None, {"zzzzzz": 1})


def test_a_long_value_is_shown_short() -> None:
    message = refusal({"text_input": "a"}, json.dumps({"max_tokens": "9" * 5000}))
    assert len(message) < 220


def test_a_nested_value_is_refused() -> None:
    assert refusal({"text_input": "a"}, '{"stop": {"a": [[[[1]]]]}}').startswith("stop is ")


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [65, 500, 100_000])
def test_json_that_is_nested_too_deeply_is_refused_by_name(levels: int) -> None:
    """Wherever text is read as JSON; the interpreter's own limit is no answer."""
    why = "which is nested more than 64 levels deep; allowed: "
    message = refusal({"text_input": "a"}, nested(levels))
    assert message.startswith('sampling_parameters is "[[[')
    assert message.endswith(f"{why}a JSON object")
    for name, value in (("sampling_parameters", f'{{"stop": {nested(levels)}}}'), ("stop_token_ids", nested(levels))):
        message = refusal({"text_input": "a"}, None, {name: value})
        assert message.startswith(f"{name} is ")
        assert why in message
        assert len(message) < 300
    assert why in refusal({}, None, {"input_ids": nested(levels)})
    assert sampling(stop_words="[" * 1000).stop_words == ("[" * 1000,), "a text that is no JSON is a stop word"


def test_an_integer_of_thousands_of_digits_is_refused_by_name() -> None:
    message = refusal({"text_input": "a"}, '{"max_tokens": ' + "9" * 5000 + "}")
    assert message.startswith("sampling_parameters is ")
    assert message.endswith(", which holds an integer of thousands of digits; allowed: a JSON object")


@pytest.mark.parametrize("tenant", ["a\nb", "a\r", "\x00", "\x1b[1m", "\x7f", "a\u2028b"])
def test_a_tenants_name_is_one_line_of_text(tenant: str) -> None:
    assert "without control characters and line breaks" in refusal({"text_input": "a", "tenant": tenant})
    assert parse_request({"text_input": "a", "tenant": "Käse & Söhne 店"}).options.tenant == "Käse & Söhne 店"


def test_brackets_in_texts_are_no_levels() -> None:
    assert parse_request({}, json.dumps({"text_input": "[{" * 1000})).text == "[{" * 1000
    assert refusal({"text_input": "a"}, nested(16)).startswith("sampling_parameters is [[")


@pytest.mark.parametrize("name", ["sampling_parameters", "input_ids", "stop_token_ids"])
def test_json_that_is_too_long_is_refused_unread(name: str) -> None:
    prompt = {} if name == "input_ids" else {"text_input": "a"}
    for text in (" " * (8 * 2**20 + 1), "é" * 2**22 + "x"):
        message = refusal(prompt, None, {name: text})
        assert message.startswith(f"{name} is ")
        assert ", which has 8388609 bytes, more than the 8388608 of any JSON; allowed: " in message
        assert len(message) < 300


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "ignore_eos", "return_log_probs", "logprobs", "n"])
def test_a_scalar_has_no_text_of_any_length(name: str) -> None:
    parse_request({"text_input": "a"}, None, {name: " " * 1000 + "1"})
    message = refusal({"text_input": "a"}, None, {name: " " * 1024 + "1"})
    assert message.startswith(f"{name} is ")
    assert ", which has 1025 characters; allowed: " in message


def test_an_unknown_name_is_shown_short() -> None:
    message = refusal({"text_input": "a"}, None, {"k" * 10**6: 1})
    assert message.startswith("k" * 77 + "… is not a parameter; allowed: ")
    assert len(message) < 1000
    assert refusal({"text_input": "a"}, '{"\\ud800": 1}').startswith("? is not a parameter; allowed: ")


names = st.sampled_from([name for first, option in ALL_OPTIONS.items() for name in (first, *option.other_names)])
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1", "-1", "true", "[1]", '["a"]', "{}", "[", "nan", "1e999", "\ud800"])
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
requests = st.dictionaries(names | st.text(max_size=12), values, max_size=4)


@given(requests, requests.map(json.dumps) | st.text(max_size=20), requests)
@settings(max_examples=60, derandomize=True)
def test_any_request_is_read_or_refused(tensors: dict[str, Any], text: str, parameters: dict[str, Any]) -> None:
    refused = None
    try:
        parsed = parse_request({"text_input": "a", **tensors}, text, parameters)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.code == "INVALID_ARG"
        assert "allowed: " in refused.message
        assert len(refused.message) < 1500
        return
    plain = msgpack.unpackb(msgpack.packb(options_to_plain(parsed.options)))
    assert options_from_plain(plain) == parsed.options, "what is accepted is within the limits of what travels"


def test_unary_requests_do_not_stream() -> None:
    assert parse_request({"text_input": "a", "stream": True}).without_streaming().options.stream is False


# What only the model knows


def test_prompt_bytes() -> None:
    check_prompt_bytes(10, 10)
    with pytest.raises(RequestError, match=r"INVALID_ARG: text_input has 11 bytes; allowed: at most 10"):
        check_prompt_bytes(11, 10)


def test_token_ids_of_the_vocabulary() -> None:
    check_token_ids("input_ids", (0, 9), 10)
    check_token_ids("stop_token_ids", (), 10)
    for token_id in (-1, 10):
        with pytest.raises(RequestError, match=f"input_ids holds {token_id}; allowed: 0 ≤ id < 10"):
            check_token_ids("input_ids", (3, token_id, 4), 10)


def test_lengths_at_their_limits_and_beyond() -> None:
    limits = LengthLimits(8, "max_req_input_len", 12, "the KV pool of 11 tokens")
    check_lengths(8, 4, limits)
    for num_input, max_tokens, named in [
        (0, 1, "no tokens"),
        (9, 1, "at most 8 prompt tokens (max_req_input_len)"),
        (8, 5, "the prompt has 8 tokens and max_tokens is 5; allowed: at most 12 in all (the KV pool of 11 tokens)"),
        (1, 12, "the prompt has 1 tokens and max_tokens is 12; allowed: at most 12 in all"),
    ]:
        with pytest.raises(RequestError) as error:
            check_lengths(num_input, max_tokens, limits)
        assert named in str(error.value)


def test_as_many_tokens_as_fit() -> None:
    limits = LengthLimits.of(EngineConfig(), 20)
    asked = parse_request({"input_ids": [1, 2, 3], "max_tokens": -1, "min_tokens": 5}).options.sampling
    request = Request("u", (1, 2, 3), asked)
    assert fitted(request, limits) == replace(request, sampling=replace(asked, max_tokens=17))
    longest = replace(request, prompt_ids=(1,) * 19)
    check_lengths(19, AS_MANY_AS_FIT, limits)
    assert fitted(longest, limits).sampling.max_tokens == 1
    with pytest.raises(RequestError, match="the prompt has 20 tokens and max_tokens is -1; allowed: at most 19 prompt"):
        check_lengths(20, AS_MANY_AS_FIT, limits)
    small = replace(request, sampling=replace(asked, max_tokens=5))
    assert fitted(small, limits) is small
