# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of prompts against transformers, on a random little LLaMA in float32."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightllm_backend.request import FinishReason, PromptLogProbs, SamplingParams
from lightllm_backend.router.router import Router
from lightllm_backend.runner import prompt_scores
from lightllm_backend.runner.warm_up import worst_batches
from lightllm_backend.worker.load import LoadedEngine
from tests.router.test_preemption import RecklessAdmission
from tests.runner.engine_harness import load, run, save_random_llama, transformers_logits

PROMPTS = [random.Random(seed).choices(range(3, 199), k=length) for seed, length in enumerate([1, 2, 13, 34, 60, 21])]
COUNTS = [3, 0, -1, 5, 2, 0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(directory: Path) -> LoadedEngine:
    return load(directory)


def check(directory: Path, prompt: list[int], num_top: int, scores: PromptLogProbs | None) -> None:
    """The scores are those of transformers; a prompt of one token has none."""
    if num_top < 0 or len(prompt) == 1:
        assert scores is None
        return
    assert scores is not None
    truth = transformers_logits(directory, prompt[:1], prompt[1:]).log_softmax(-1)
    chosen = truth.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(np.frombuffer(scores.log_probs, np.float32), chosen, atol=1e-4)
    top = truth.topk(num_top)
    np.testing.assert_array_equal(np.frombuffer(scores.top_ids, np.int32), top.indices.flatten())
    np.testing.assert_allclose(np.frombuffer(scores.top_log_probs, np.float32), top.values.flatten(), atol=1e-4)


@pytest.mark.parametrize(("batch_max_tokens", "overlap", "tokens_at_once"), [(4096, 0, 256), (4096, 1, 5), (7, 1, 5)])
def test_they_are_the_models_own(engine, directory, batch_max_tokens, overlap, tokens_at_once, monkeypatch) -> None:
    """Beside prompts that do not ask, of cut prompts, and of prompts that the cache has already."""
    monkeypatch.setattr(prompt_scores, "TOKENS_AT_ONCE", tokens_at_once)
    sampling = [
        SamplingParams(max_tokens=6, do_sample=index % 2 == 0, temperature=0.7, prompt_logprobs=count)
        for index, count in enumerate(COUNTS)
    ]
    silent = [replace(params, prompt_logprobs=-1) for params in sampling]
    answers = run(
        engine, PROMPTS * 2, sampling * 2, [0, 0, 1, 2, 2, 3] * 2, batch_max_tokens=batch_max_tokens, overlap=overlap
    )
    for prompt, count, answer in zip(PROMPTS * 2, COUNTS * 2, answers, strict=True):
        check(directory, prompt, count, answer.prompt)
    assert [answer.token_ids for answer in answers[:6]] == [one.token_ids for one in run(engine, PROMPTS, silent)]


def test_without_new_tokens(engine, directory) -> None:
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    for prompt, answer in zip(PROMPTS, run(engine, PROMPTS, sampling, batch_max_tokens=16), strict=True):
        assert (answer.token_ids, answer.reason) == ([], FinishReason.LENGTH)
        check(directory, prompt, 1, answer.prompt)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_preemption_neither_loses_nor_repeats_them(engine, directory, overlap) -> None:
    router = Router(90, 16, 16, max_queue_size=99, eos_ids=frozenset({2}), policy=RecklessAdmission())
    sampling = SamplingParams(max_tokens=25, prompt_logprobs=2, ignore_eos=True)
    answers = run(engine, PROMPTS * 2, sampling, overlap=overlap, router=router)
    assert router.stats().preemptions_total > 3
    for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
        assert len(answer.token_ids) == 25
        check(directory, prompt, 2, answer.prompt)


def test_the_largest_step_is_part_of_the_measured_workspace(engine) -> None:
    batch = worst_batches(num_rows=16, max_input=200, batch_max_tokens=400)[-1]
    assert [scores.top_ids.shape for scores in engine.runner.launch(batch).result().scores] == [(199, 20)] * 2
