# SPDX-License-Identifier: Apache-2.0
"""Stop strings: where they cut the text, and what is held back for them."""

from __future__ import annotations

import pytest

from lightllm_client import Generation, LightLLMClient
from tests.e2e.conftest import Reference

pytestmark = pytest.mark.e2e

PROMPT = "The capital of Japan is"


@pytest.fixture(scope="module")
def unstopped(client: LightLLMClient) -> Generation:
    answer = client.generate(PROMPT, max_tokens=16)
    assert answer.finish_reason == "length"
    return answer


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_stop_string_across_tokens(
    client: LightLLMClient, reference: Reference, unstopped: Generation, stream: bool
) -> None:
    ids = list(unstopped.token_ids)
    pieces = [reference.decode([token_id]) for token_id in ids]
    stop = pieces[1] + pieces[2] + pieces[3] + pieces[4][:2]  # ends inside the fifth token
    options = {"max_tokens": 16, "stop_words": ["never said", stop], "return_log_probs": True}
    answer = Generation.join(client.stream(PROMPT, **options)) if stream else client.generate(PROMPT, **options)
    assert answer.finish_reason == "stop"
    assert answer.text == pieces[0]
    assert list(answer.token_ids) == ids[:5], "the token that completes the stop string is the last"
    assert answer.num_output_tokens == 5
    assert len(answer.log_probs) == 5
    assert answer.cumulative_logprob == pytest.approx(sum(answer.log_probs), abs=1e-4)


def test_no_chunk_shows_the_start_of_a_stop_string(client: LightLLMClient, unstopped: Generation) -> None:
    stop = unstopped.text[4:14]
    shown = ""
    for chunk in client.stream(PROMPT, max_tokens=16, stop_words=[stop]):
        shown += chunk.text
        assert unstopped.text[:4].startswith(shown)
    assert shown == unstopped.text[:4]


def test_text_held_back_for_a_stop_string_that_does_not_come(client: LightLLMClient, unstopped: Generation) -> None:
    almost = unstopped.text[-3:] + "never said"
    answer = Generation.join(client.stream(PROMPT, max_tokens=16, stop_words=[almost]))
    assert answer.finish_reason == "length"
    assert answer.text == unstopped.text


def test_the_earliest_stop_string_wins(client: LightLLMClient, unstopped: Generation) -> None:
    words = [unstopped.text[20:24], unstopped.text[7:9]]
    position = min(unstopped.text.index(word) for word in words)
    answer = client.generate(PROMPT, max_tokens=16, stop_words=words)
    assert answer.text == unstopped.text[:position]


def test_min_tokens_holds_a_stop_string_back(client: LightLLMClient, unstopped: Generation) -> None:
    stop = unstopped.text[:4]
    assert client.generate(PROMPT, max_tokens=16, stop_words=[stop]).text == ""
    later = client.generate(PROMPT, max_tokens=16, stop_words=[stop], min_tokens=8)
    assert later.num_output_tokens >= 8
    assert later.text.startswith(stop)
