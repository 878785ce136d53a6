# SPDX-License-Identifier: Apache-2.0
"""Each family on a GPU: the tokens of transformers in float32, and with int8 K and V where the choice is clear."""

import random

import pytest
import torch

from lightllm_backend.request import SamplingParams
from tests.models.random_models import FAMILIES, VOCAB, save_random_model
from tests.runner.engine_harness import load, run, transformers_greedy, transformers_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

PROMPTS = [
    random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate([1, 2, 7, 16, 33, 100, 200])
]
MAX_TOKENS = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, family) -> None:
    save_random_model(family, tmp_path)
    answers = run(load(tmp_path), PROMPTS, SamplingParams(max_tokens=MAX_TOKENS), batch_max_tokens=60)
    assert [answer.token_ids for answer in answers] == transformers_greedy(tmp_path, PROMPTS, MAX_TOKENS, "cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_keys_and_values_choose_the_same_where_the_choice_is_clear(tmp_path, family) -> None:
    save_random_model(family, tmp_path)
    engine = load(tmp_path, kv_dtype="int8")
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, run(engine, PROMPTS, sampling), strict=True):
        logits = transformers_logits(tmp_path, prompt, answer.token_ids, "cuda")
        chosen = logits.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert float((logits.max(-1).values - chosen).max()) < 0.25 * float(logits.std())
