# SPDX-License-Identifier: Apache-2.0
"""Seeds, several answers to one prompt, and requests that join while others run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from lightllm_client import LightLLMClient
from tests.e2e.calls import generate, in_parallel, infer_grpc, stream_grpc
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

MAX_TOKENS = 10
PROMPT = "Once upon a time, in a land far away,"


def test_log_probabilities_of_a_stream(client: LightLLMClient) -> None:
    chunks = list(client.stream(PROMPT, max_tokens=MAX_TOKENS, return_log_probs=True))
    so_far = 0.0
    for chunk in chunks:
        assert len(chunk.log_probs) == len(chunk.token_ids) == chunk.num_output_tokens
        so_far += sum(chunk.log_probs)
        assert chunk.cumulative_logprob == pytest.approx(so_far, abs=1e-4)


def test_a_seed_gives_the_same_tokens_alone_and_among_others(client: LightLLMClient) -> None:
    options = {"max_tokens": MAX_TOKENS, "temperature": 1.2, "top_p": 0.95}
    alone = client.generate(PROMPT, seed=7, **options)
    seeds = [*range(100, 104), 7, *range(104, 108)]
    together = in_parallel([lambda seed=seed: client.generate(PROMPT, seed=seed, **options) for seed in seeds])
    assert together[4].token_ids == alone.token_ids
    assert len({answer.token_ids for answer in together}) == len(seeds), "another seed, other tokens"


def test_requests_without_a_seed_differ(client: LightLLMClient) -> None:
    calls = [lambda: client.generate(PROMPT, max_tokens=MAX_TOKENS, temperature=1.5) for _ in range(2)]
    first, second = in_parallel(calls)
    assert first.token_ids != second.token_ids


def test_a_request_joins_while_another_runs(client: LightLLMClient) -> None:
    """Continuous batching: the short answer does not wait for the long one."""
    first_chunk, over = threading.Event(), threading.Event()

    def run_long() -> None:
        with client.stream(PROMPT, max_tokens=1000, ignore_eos=True) as stream:
            for _ in stream:
                first_chunk.set()
                if over.is_set():
                    return

    thread = threading.Thread(target=run_long)
    thread.start()
    assert first_chunk.wait(60)
    answer = client.generate("The capital of France is", max_tokens=4)
    assert thread.is_alive(), "the long answer is still under way"
    over.set()
    thread.join(60)
    assert answer.num_output_tokens == 4


def test_answers_to_one_prompt_are_those_of_their_seeds(server: TritonServer, client: LightLLMClient) -> None:
    sampling: dict[str, Any] = {"max_tokens": 6, "do_sample": True, "temperature": 1.5, "return_log_probs": True}
    alone = [client.generate(PROMPT, seed=seed, **sampling) for seed in (7, 8, 9)]
    several = client.generate_several(PROMPT, seed=7, n=3, **sampling)
    assert [one.token_ids for one in several] == [one.token_ids for one in alone]
    body = {"text_input": PROMPT, "seed": 7, "num_return_sequences": 3, **sampling}
    unary = infer_grpc(server, body)
    status, generated = generate(server, body)
    [streamed] = stream_grpc(server, body)
    assert unary == streamed
    assert (status, generated["text_output"]) == (200, unary["text_output"])
    assert unary["text_output"] == [one.text for one in alone]
    assert unary["sequence_index"] == [0, 1, 2]
    assert unary["num_output_tokens"] == [one.num_output_tokens for one in alone]
    assert unary["output_ids"] == [token_id for one in alone for token_id in one.token_ids]
    assert unary["cumulative_logprob"] == pytest.approx([one.cumulative_logprob for one in alone], abs=1e-3)


def test_a_deadline_ends_all_answers_with_one_error(server: TritonServer) -> None:
    body = {"text_input": "Once", "max_tokens": 1000, "n": 4, "ignore_eos": True, "stream": True}
    with pytest.raises(InferenceServerException, match="CANCELLED: the request's deadline has passed"):
        stream_grpc(server, body, timeout=1_500_000)
