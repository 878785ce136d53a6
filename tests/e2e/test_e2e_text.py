# SPDX-License-Identifier: Apache-2.0
"""The text of answers: streamed or not it is the same, and no character is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lightllm_client import Chunk, Generation, LightLLMClient
from tests.e2e.calls import in_parallel, infer_grpc
from tests.e2e.conftest import Reference
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CHAT = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\nThe capital of Japan is"
REPEATED = {
    "emoji": "🎉🚀🎉🚀🎉🚀🎉🚀🎉🚀🎉🚀",
    "family": "👩‍👩‍👧‍👦👩‍👩‍👧‍👦👩‍👩‍👧‍👦👩‍👩‍👧‍👦",
    "cjk": "你好世界你好世界你好世界你好世界",
    "combining": "e\u0301o\u0308e\u0301o\u0308e\u0301o\u0308e\u0301o\u0308e\u0301o\u0308",
    "devanagari": "नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते नमस्ते",
}


class Answer(NamedTuple):
    chunks: list[Chunk]
    whole: Generation
    echoed: Generation  # with the prompt in front


@pytest.fixture(scope="module")
def repeated(full_client: LightLLMClient) -> dict[str, Answer]:
    """How each prompt goes on, all at once."""
    calls: list[Callable[[], Any]] = []
    for prompt in REPEATED.values():
        calls += [
            lambda prompt=prompt: list(full_client.stream(prompt, max_tokens=16)),
            lambda prompt=prompt: full_client.generate(prompt, max_tokens=16),
            lambda prompt=prompt: full_client.generate(prompt, max_tokens=16, exclude_input_in_output=False),
        ]
    answers = iter(in_parallel(calls))
    return {name: Answer(next(answers), next(answers), next(answers)) for name in REPEATED}


@pytest.mark.parametrize("name", REPEATED)
def test_streamed_text_is_the_unstreamed_text(repeated: dict[str, Answer], reference: Reference, name: str) -> None:
    chunks, whole, echoed = repeated[name]
    # The answer goes on with the characters that it was given, or the test would show nothing.
    continuation = reference.decode(list(whole.token_ids))
    assert any(ord(character) > 0x300 for character in continuation)
    assert whole.text == continuation
    assert echoed.text == REPEATED[name] + continuation
    assert Generation.join(chunks) == whole
    # max_tokens may cut the last character, which then shows as what it is; nothing before may.
    assert not any(REPLACEMENT in chunk.text for chunk in chunks[:-1])


def test_streams_that_share_the_detokenizers_are_the_unary_answers(
    full_server: TritonServer, full_client: LightLLMClient
) -> None:
    """The chunks of each go through several instances, none of which sees all of a character or of a stop string."""
    options = [{}, {"exclude_input_in_output": False}, {"stop_words": ["世界你", "🎉🚀🎉"]}]
    calls = [(prompt, {**more, "max_tokens": 16}) for prompt in REPEATED.values() for more in options]

    def stream(prompt: str, options: dict[str, Any]) -> Generation:
        return Generation.join(full_client.stream(prompt, return_log_probs=True, **options))

    def unary(prompt: str, options: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = infer_grpc(full_server, {"text_input": prompt, "return_log_probs": True, **options})
        return answer

    answers = in_parallel([lambda way=way, call=call: way(*call) for way in (stream, unary) for call in calls])
    streamed, wholes = answers[: len(calls)], answers[len(calls) :]
    for answer, whole in zip(streamed, wholes, strict=True):
        assert (answer.text, list(answer.token_ids)) == (whole["text_output"], whole["output_ids"])
        assert (answer.finish_reason, answer.num_output_tokens) == (whole["finish_reason"], whole["num_output_tokens"])
        assert answer.cumulative_logprob == pytest.approx(whole["cumulative_logprob"], rel=1e-3)
    assert {answer.finish_reason for answer in streamed} == {"length", "stop"}


@pytest.mark.parametrize("options", [{}, {"temperature": 20.0, "seed": 1}], ids=["greedy", "wild"])
def test_text_that_begins_inside_a_character(
    full_client: LightLLMClient, reference: Reference, options: dict[str, Any]
) -> None:
    """The prompt ends with half a character, so the answer's first bytes are no character by themselves."""
    half = reference.encode(REPEATED["emoji"])[:-1]
    assert reference.decode(half).endswith(REPLACEMENT)
    whole, streamed = in_parallel(
        [
            lambda: full_client.generate(half, max_tokens=12, **options),
            lambda: Generation.join(full_client.stream(half, max_tokens=12, **options)),
        ]
    )
    assert streamed == whole
    # A character that the prompt begins is the answer's, whole or broken.
    before = reference.decode(half).rstrip(REPLACEMENT)
    assert whole.text == reference.decode([*half, *whole.token_ids]).removeprefix(before)
    assert options or not whole.text.startswith(REPLACEMENT)


def test_echo_of_token_ids(full_client: LightLLMClient, reference: Reference) -> None:
    ids = reference.encode(REPEATED["cjk"])
    answer = full_client.generate(ids, max_tokens=4, exclude_input_in_output=False)
    assert answer.text == REPEATED["cjk"] + reference.decode(list(answer.token_ids))


# End of sequence

STOPS = {"<|im_end|>": " Tokyo.", "yo.<|im_end|>": " Tok"}  # a stop string, and the text before it


@pytest.fixture(scope="module")
def chats(full_client: LightLLMClient) -> Callable[..., Generation]:
    """The answer to CHAT with these options, streamed or not. The model has given all of them at once."""
    asked: list[dict[str, Any]] = [
        {"max_tokens": 16},
        {"max_tokens": 16, "skip_special_tokens": False},
        {"max_tokens": 8, "ignore_eos": True},
        {"max_tokens": 8, "ignore_eos": True, "skip_special_tokens": False},
        {"max_tokens": 12, "min_tokens": 6},
        {"max_tokens": 1, "parse_special": False},
        *({"max_tokens": 16, "stop_words": [stop]} for stop in STOPS),
        *({"max_tokens": 16, "stop_words": [stop], "ignore_eos": True} for stop in STOPS),
    ]
    wholes = [lambda options=options: full_client.generate(CHAT, **options) for options in asked]
    streams = [lambda options=options: Generation.join(full_client.stream(CHAT, **options)) for options in asked]
    answers = in_parallel([*wholes, *streams])

    def chat(streamed: bool = False, **options: Any) -> Generation:
        generation: Generation = answers[asked.index(options) + len(asked) * streamed]
        return generation

    return chat


@pytest.mark.parametrize("streamed", [False, True])
def test_eos_ends_and_is_not_text(chats: Callable[..., Generation], reference: Reference, streamed: bool) -> None:
    answer = chats(streamed, max_tokens=16)
    assert answer.text == " Tokyo."
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == reference.eos_id
    assert answer.num_output_tokens == len(answer.token_ids) == 3
    shown = chats(streamed, max_tokens=16, skip_special_tokens=False)
    assert shown.text == " Tokyo.", "an EOS that ends the sequence is never text"


@pytest.mark.parametrize("streamed", [False, True])
def test_ignore_eos_makes_it_an_ordinary_token(
    chats: Callable[..., Generation], reference: Reference, streamed: bool
) -> None:
    answer = chats(streamed, max_tokens=8, ignore_eos=True, skip_special_tokens=False)
    assert answer.finish_reason == "length"
    assert answer.num_output_tokens == 8
    assert answer.text.startswith(" Tokyo.<|im_end|>")
    hidden = chats(streamed, max_tokens=8, ignore_eos=True)
    assert hidden.token_ids == answer.token_ids
    assert hidden.text == reference.decode(list(answer.token_ids))


@pytest.mark.parametrize("streamed", [False, True])
def test_min_tokens_forbids_eos(chats: Callable[..., Generation], reference: Reference, streamed: bool) -> None:
    answer = chats(streamed, max_tokens=12, min_tokens=6)
    assert answer.num_output_tokens >= 6
    assert reference.eos_id not in answer.token_ids[:6]


@pytest.mark.parametrize("stop", STOPS)
def test_a_special_token_is_a_stop_string_though_it_is_not_shown(
    chats: Callable[..., Generation], reference: Reference, stop: str
) -> None:
    whole = chats(max_tokens=16, stop_words=[stop], ignore_eos=True)
    assert (whole.text, whole.finish_reason, whole.token_ids[-1]) == (STOPS[stop], "stop", reference.eos_id)
    assert chats(streamed=True, max_tokens=16, stop_words=[stop], ignore_eos=True) == whole
    ended = chats(max_tokens=16, stop_words=[stop])
    assert (ended.text, ended.token_ids) == (whole.text, whole.token_ids), "though EOS ends it anyway"


def test_special_tokens_in_the_prompt(chats: Callable[..., Generation], reference: Reference) -> None:
    parsed, plain = chats(max_tokens=16), chats(max_tokens=1, parse_special=False)
    assert parsed.num_input_tokens == len(reference.encode(CHAT))
    assert plain.num_input_tokens > parsed.num_input_tokens
