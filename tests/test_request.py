# SPDX-License-Identifier: Apache-2.0
"""The values that travel: errors as text, what sampling needs, options as JSON."""

from typing import Any

import pytest

from lightllm_backend.options import parse_request
from lightllm_backend.request import RequestError, RequestOptions, SamplingParams


@pytest.mark.parametrize("code", RequestError.CODES)
def test_an_error_and_its_text_are_one(code: str) -> None:
    error = RequestError(code, "what: and why")
    assert str(error) == f"{code}: what: and why"
    parsed = RequestError.parse(str(error))
    assert (parsed.code, parsed.message) == (code, "what: and why")


@pytest.mark.parametrize("text", ["something broke", "KeyError: 'a'", ""])
def test_a_text_without_a_known_code_is_internal(text: str) -> None:
    assert (RequestError.parse(text).code, RequestError.parse(text).message) == ("INTERNAL", text)


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (SamplingParams(), True),
        (SamplingParams(do_sample=True), False),
        (SamplingParams(do_sample=True, temperature=0.0), True),
        (SamplingParams(do_sample=False, temperature=0.7), True),
    ],
)
def test_greedy_unless_it_samples_at_a_temperature(sampling: SamplingParams, greedy: bool) -> None:
    assert sampling.greedy is greedy


@pytest.mark.parametrize(
    ("changes", "penalised"),
    [
        ({}, False),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"min_tokens": 2}, True),
        ({"min_tokens": 2, "ignore_eos": True}, False),
        ({"min_tokens": 2, "ignore_eos": True, "stop_token_ids": (5,)}, True),
        ({"stop_token_ids": (5,)}, False),
    ],
)
def test_logits_are_changed_only_where_something_asks_for_it(changes: dict[str, Any], penalised: bool) -> None:
    assert SamplingParams(**changes).penalised is penalised


def test_options_survive_their_json() -> None:
    sampling = SamplingParams(
        max_tokens=7, do_sample=True, temperature=0.3, top_p=0.9, top_k=5, presence_penalty=0.1, frequency_penalty=0.2,
        repetition_penalty=1.2, seed=2**64 - 1, min_tokens=3, ignore_eos=True, stop_words=("é", "\n\n"),
        stop_token_ids=(5, 0), return_log_probs=True,
    )  # fmt: skip
    options = RequestOptions(sampling, True, False, False, False, "Ünit 7", -3)
    assert parse_request({"input_ids": [1]}, options.to_json()).options == options


@pytest.mark.parametrize("sampling", [SamplingParams(seed=5), SamplingParams(temperature=0.5, top_k=3)])
def test_what_is_as_usual_need_not_be_said_in_it(sampling: SamplingParams) -> None:
    options = RequestOptions(sampling, stream=True)
    assert len(options.to_json()) < 80
    assert parse_request({"input_ids": [1]}, options.to_json()).options == options
