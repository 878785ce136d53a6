# SPDX-License-Identifier: Apache-2.0
"""The tokens of answers against transformers in float32: greedy decoding, log probabilities, penalties."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lightllm_client import Generation, LightLLMClient
from tests.e2e.calls import infer_grpc
from tests.e2e.conftest import Reference
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

MAX_TOKENS = 8


def chat(*messages: str) -> str:
    turns = zip(("user", "assistant") * len(messages), messages, strict=False)
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


PROMPTS = [
    "A",
    " ",
    "\n\n",
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "1, 2, 3, 4, 5,",
    "The quick brown fox jumps over the lazy dog. " * 60,
    "In the beginning there was nothing. " * 12 + "Then",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    '#include <stdio.h>\n\nint main(void) {\n    printf("',
    '{"name": "Ada", "born": 1815, "languages": [',
    "SELECT name, count(*) FROM orders WHERE",
    "Die Hauptstadt von Österreich heißt",
    "東京は日本の",
    "Москва - столица",
    "مرحبا بالعالم",
    "🙂🙃 smile 🎂",
    "cafe\u0301 nai\u0308ve",
    "<|im_start|>assistant\n",
    chat(""),
    chat("What is 2 + 2?"),
    chat("Name a colour.", "Blue.", "Another one?"),
    "https://example.com/search?q=",
    "\ttabs\tand  spaces   ",
]


@pytest.fixture(scope="module")
def together(full_client: LightLLMClient) -> list[Generation]:
    """The answer to each prompt, all of which run at once and came in random order."""
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    streams = {index: full_client.stream(PROMPTS[index], max_tokens=MAX_TOKENS) for index in order}
    return [Generation.join(streams[index]) for index in range(len(PROMPTS))]


def test_greedy_tokens_equal_transformers(together: list[Generation], reference: Reference) -> None:
    for prompt, answer in zip(PROMPTS, together, strict=True):
        prompt_ids, ids = reference.encode(prompt), list(answer.token_ids)
        assert answer.num_input_tokens == len(prompt_ids)
        assert reference.greedy_matches(prompt_ids, ids), prompt
        assert reference.eos_id not in ids[:-1], prompt
        ended = ids[-1] == reference.eos_id
        assert answer.finish_reason == ("stop" if ended else "length"), prompt
        assert ended or len(ids) == MAX_TOKENS, prompt
        assert answer.text == reference.decode(ids), prompt
    assert max(answer.num_input_tokens for answer in together) >= 600, "longer than one step's prefill"
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


@pytest.mark.parametrize("index", [0, 3, 7, 21])
def test_a_request_alone_gets_the_same(full_client: LightLLMClient, together: list[Generation], index: int) -> None:
    assert full_client.generate(PROMPTS[index], max_tokens=MAX_TOKENS) == together[index]


def test_64_requests_at_once(full_client: LightLLMClient, together: list[Generation]) -> None:
    short = [index for index, answer in enumerate(together) if answer.num_input_tokens < 20]
    chosen = [random.Random(2).choice(short) for _ in range(64)]
    streams = [full_client.stream(PROMPTS[index], max_tokens=3) for index in chosen]
    for index, stream in zip(chosen, streams, strict=True):
        assert Generation.join(stream).token_ids == together[index].token_ids[:3], PROMPTS[index]


# Log probabilities


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 50, "seed": 5, "frequency_penalty": 0.5}], ids=["greedy", "sampled"]
)
def test_log_probabilities_are_of_the_models_own_distribution(
    full_client: LightLLMClient, reference: Reference, options: dict[str, Any]
) -> None:
    prompt = PROMPTS[4]
    answer = full_client.generate(prompt, max_tokens=MAX_TOKENS, return_log_probs=True, **options)
    ids = list(answer.token_ids)
    expected = reference.logits(reference.encode(prompt), ids).log_softmax(-1)[torch.arange(len(ids)), ids]
    assert list(answer.log_probs) == pytest.approx(expected.tolist(), abs=1e-3)
    assert answer.cumulative_logprob == pytest.approx(float(expected.sum()), abs=1e-2)


# Penalties


@pytest.mark.parametrize(
    "penalties",
    [{"presence_penalty": 6.0}, {"frequency_penalty": 0.8}, {"presence_penalty": -0.5, "frequency_penalty": 1.0}],
    ids=["presence", "frequency", "both"],
)
def test_presence_and_frequency_count_generated_tokens(
    full_client: LightLLMClient, reference: Reference, penalties: dict[str, float]
) -> None:
    prompt = "1 1 1 1 1 1 1 1"
    ids = list(full_client.generate(prompt, max_tokens=MAX_TOKENS, **penalties).token_ids)
    logits = reference.logits(reference.encode(prompt), ids)
    for position, row in enumerate(logits):
        counts = torch.bincount(torch.tensor(ids[:position], dtype=torch.long), minlength=len(row))
        frequency, presence = penalties.get("frequency_penalty", 0.0), penalties.get("presence_penalty", 0.0)
        row.sub_(counts * frequency + (counts > 0) * presence)
    assert logits.argmax(-1).tolist() == ids
    assert not reference.greedy_matches(reference.encode(prompt), ids), "the penalties show"


def test_repetition_penalty_includes_the_prompt(full_client: LightLLMClient, reference: Reference) -> None:
    prompt, penalty = "1 1 1 1 1 1 1 1", 1.3
    prompt_ids = reference.encode(prompt)
    ids = list(full_client.generate(prompt, max_tokens=MAX_TOKENS, repetition_penalty=penalty).token_ids)
    logits = reference.logits(prompt_ids, ids)
    for position, row in enumerate(logits):
        seen = torch.tensor(sorted({*prompt_ids, *ids[:position]}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    assert logits.argmax(-1).tolist() == ids
    assert not reference.greedy_matches(prompt_ids, ids), "the penalty shows"


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_log_probabilities_of_a_prompt_are_those_of_transformers(
    full_server: TritonServer, full_client: LightLLMClient, reference: Reference, max_tokens: int
) -> None:
    prompt = PROMPTS[3]
    ids = reference.encode(prompt)
    truth = reference.logits(ids[:1], ids[1:]).log_softmax(-1)
    generation = full_client.generate(prompt, max_tokens=max_tokens, prompt_logprobs=2)
    assert (generation.num_output_tokens, generation.finish_reason) == (max_tokens, "length")
    scores = generation.prompt_log_probs
    assert scores is not None
    chosen = truth.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    assert torch.allclose(torch.tensor(scores.log_probs), chosen, atol=1e-3)
    assert [[token_id for token_id, _ in pairs] for pairs in scores.top] == truth.topk(2).indices.tolist()
    unary = infer_grpc(full_server, {"text_input": prompt, "max_tokens": max_tokens, "prompt_logprobs": 0})
    assert unary["prompt_log_probs"] == pytest.approx(list(scores.log_probs), abs=1e-4)
    assert unary["prompt_top_token_ids"] == []
